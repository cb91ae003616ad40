# Bare `make` prints the targets. Each calls a script; what it needs, it installs by name.
.PHONY: help build demo test test-cluster bench simulate fuzz lint

help: ## print this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: ## build bin/kube2iam-cni, bin/kube2iam-agent and bin/kube2iam-proxy
	@scripts/build.sh

demo: ## show the whole thing at work in network namespaces (root, three minutes cold)
	@scripts/demo.sh

test: ## all tests but the cluster suite (root, five minutes); RUN=REGEXP runs matching tests only
	@RUN='$(value RUN)' scripts/test.sh

test-cluster: ## the cluster suite: a real Kubernetes node, STS and S3 (root, twenty minutes cold)
	@scripts/test-cluster.sh

bench: ## print figures as "name value unit" (root, twenty minutes); PART=NAME measures one part, PART=list lists them
	@PART='$(value PART)' scripts/bench.sh

simulate: ## what a fleet of 5,000 nodes asks of STS, and docs/scale.svg (two minutes)
	@scripts/simulate.sh

fuzz: ## run each fuzz target for half a minute
	@scripts/fuzz.sh

lint: ## gofmt, go vet and go mod tidy
	@scripts/lint.sh
