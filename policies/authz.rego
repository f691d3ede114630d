# The policy that this proxy ships with. `policies/README.md` explains the input document, field by field.
#
# It works without being edited: every agent whose token is valid may list and use the models that run on this
# machine. Edit the three constants below, or add rules: a reason added to `deny` refuses, whatever `allow` says.
# Try it:  behavry-ollama-proxy policy test      behavry-ollama-proxy policy explain --model llama3.2 --role external
package behavry.authz

# The models that may be used. Empty: every local model. Names are short: "llama3.2" is also "llama3.2:latest";
# another size is another name ("llama3.2:1b").
approved_models := set()

# Roles that may not use models here.
blocked_roles := {"external"}

# Cloud models send prompts to ollama.com. The proxy's own configuration must allow them too.
cloud_models_allowed := false

# What may pass if nothing below denies it. The token's permissions (web:read, web:write) were already checked.
default allow := false

# `read` covers `/` and `/api/version`, which clients ask for first; there `input.model` is null.
allow if input.request.kind in {"read", "list", "infer"}

# Pull, push, create, copy, delete.
allow if {
	input.request.kind == "manage"
	"ollama:admin" in input.agent.permissions
}

allow if {
	input.request.kind == "egress"
	cloud_models_allowed
}

deny contains sprintf("model %s is not approved", [input.model]) if {
	count(approved_models) > 0
	input.model != null
	not input.model in approved_models
}

deny contains sprintf("agents with the role %s may not use local models", [input.agent_role]) if {
	input.agent_role in blocked_roles
	not harmless
}

deny contains "managing models needs the permission ollama:admin" if {
	input.request.kind == "manage"
	not "ollama:admin" in input.agent.permissions
}

deny contains "cloud models are not allowed: prompts would leave this network" if {
	input.model_ref.source == "cloud"
	not cloud_models_allowed
}

deny contains "requests that leave this network are not allowed" if {
	input.request.kind == "egress"
	not cloud_models_allowed
}

# Names no model and tells nothing about one.
harmless if {
	input.request.kind == "read"
	input.model == null
}
