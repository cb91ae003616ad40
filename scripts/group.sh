# Sourced by scripts that run something long: however such a script ends, what it runs ends with it.

# in_group COMMAND...: runs a command in a process group of its own, so that a signal to this script ends all of it at once.
group=
in_group() {
  local status=0
  set -m
  "$@" 9>&- &
  group=$!
  set +m
  wait "$group" || status=$?
  group=
  return "$status"
}

end_group() {
  [[ -n $group ]] || return 0
  kill -TERM -- "-$group" 2>/dev/null || true
  wait "$group" 2>/dev/null || true
}

trap end_group EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
