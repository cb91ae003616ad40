{{/* The agent's flags for what the entry says, in the order of the keys. */}}
{{- define "kube2iam-cni.entry" -}}
{{- $flags := dict "proxyIP" "proxy-ip" "proxyPort" "proxy-port" "metadataIP" "metadata-ip" "stateDir" "state-dir" "backend" "backend" "guard" "guard" "mark" "mark" "path" "path" -}}
{{- range $key, $value := .Values.entry }}
- {{ printf "--%s=%v" (get $flags $key) $value | quote }}
{{- end }}
{{- end }}

{{/* Where the records are on the node. */}}
{{- define "kube2iam-cni.stateDir" -}}
{{ .Values.entry.stateDir | default "/run/kube2iam-cni" }}
{{- end }}
