{{/* The agent's flags for what the entry says, in the order of the keys. */}}
{{- define "kube2iam-cni.entry" -}}
{{- range $key, $value := .Values.entry }}
- {{ printf "--%s=%v" (kebabcase $key) $value | quote }}
{{- end }}
{{- end }}

{{/* Where the records are on the node. */}}
{{- define "kube2iam-cni.stateDir" -}}
{{ .Values.entry.stateDir | default "/run/kube2iam-cni" }}
{{- end }}

{{/* The command of a probe of the proxy, of the chart's root and the probe's name. */}}
{{- define "kube2iam-cni.probe" -}}
{{- $command := list "/kube2iam-proxy" (index . 1) -}}
{{- with (index . 0).Values.entry.stateDir -}}
{{- $command = append $command (printf "--state-dir=%s" .) -}}
{{- end -}}
{{ toJson $command }}
{{- end }}

{{/* The flags of the agent and of uninstall for the node's places, where they are given. */}}
{{- define "kube2iam-cni.places" -}}
{{- with .Values.places.programs }}
- --cni-bin-dir={{ . }}
{{- end }}
{{- with .Values.places.configurations }}
- --cni-conf-dir={{ . }}
{{- end }}
{{- if ne .Values.places.cache "/var/lib/cni" }}
- --cni-cache-dir={{ .Values.places.cache }}
{{- end }}
{{- end }}

{{/* What no schema can say. */}}
{{- define "kube2iam-cni.check" -}}
{{- $port := int (.Values.entry.proxyPort | default 8181) -}}
{{- if eq $port (int .Values.proxy.metricsPort) -}}
{{- fail (printf "proxy.metricsPort and the port that pods are redirected to are both %d: pods would be served metrics" $port) -}}
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
{{- fail "baseRoleARN is empty: an annotation could name its role only by the whole ARN. Set baseRoleARN, for example to arn:aws:iam::123456789012:role/, or add --auto-discover-base-arn to proxy.args. If all annotations hold whole ARNs, set any prefix: whole ARNs do not use it" -}}
{{- end -}}
{{- end }}
