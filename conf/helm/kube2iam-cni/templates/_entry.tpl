{{/* The agent's flags for the keys of the entry, in the order of the keys. */}}
{{- define "kube2iam-cni.entry" -}}
{{- range $key, $value := .Values.entry }}
- {{ printf "--%s=%v" (kebabcase $key) $value | quote }}
{{- end }}
{{- end }}

{{/* The state directory. */}}
{{- define "kube2iam-cni.stateDir" -}}
{{ .Values.entry.stateDir | default "/run/kube2iam-cni" }}
{{- end }}

{{/* The command of a probe of the proxy. Its arguments are the chart's root and the probe's name. */}}
{{- define "kube2iam-cni.probe" -}}
{{- $command := list "/kube2iam-proxy" (index . 1) -}}
{{- with (index . 0).Values.entry.stateDir -}}
{{- $command = append $command (printf "--state-dir=%s" .) -}}
{{- end -}}
{{ toJson $command }}
{{- end }}

{{/* The flags of the agent and of uninstall for the CNI directories that are set. */}}
{{- define "kube2iam-cni.dirs" -}}
{{- with .Values.cni.binDir }}
- --cni-bin-dir={{ . }}
{{- end }}
{{- with .Values.cni.confDir }}
- --cni-conf-dir={{ . }}
{{- end }}
{{- if ne .Values.cni.cacheDir "/var/lib/cni" }}
- --cni-cache-dir={{ .Values.cni.cacheDir }}
{{- end }}
{{- end }}

{{/* Checks of values that the schema cannot express. */}}
{{- define "kube2iam-cni.check" -}}
{{- $port := int (.Values.entry.proxyPort | default 8181) -}}
{{- if eq $port (int .Values.proxy.metricsPort) -}}
{{- fail (printf "proxy.metricsPort and entry.proxyPort are both %d" $port) -}}
{{- end -}}
{{- $base := .Values.baseRoleARN -}}
{{- $true := "(1|t|T|true|TRUE|True)" -}}
{{- range .Values.proxy.args -}}
{{- if regexMatch (printf "^--(base-role-arn=.+|auto-discover-base-arn(=%s)?)$" $true) . }}{{ $base = . }}{{ end -}}
{{- end -}}
{{- range .Values.proxy.env -}}
{{- $value := .value | toString -}}
{{- if .valueFrom }}{{ $value = "true" }}{{ end -}}
{{- if and (eq .name "KUBE2IAM_BASE_ROLE_ARN") (or .value .valueFrom) }}{{ $base = .name }}{{ end -}}
{{- if and (eq .name "KUBE2IAM_AUTO_DISCOVER_BASE_ARN") (regexMatch (printf "^%s$" $true) $value) }}{{ $base = .name }}{{ end -}}
{{- end -}}
{{- if not $base -}}
{{- fail "baseRoleARN is empty: set it, for example to arn:aws:iam::123456789012:role/, or add --auto-discover-base-arn to proxy.args. If all annotations have whole ARNs, set any prefix" -}}
{{- end -}}
{{- end }}
