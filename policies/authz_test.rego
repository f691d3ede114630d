# Run with `behavry-ollama-proxy policy test`. A test passes when its rule is true.
package behavry.authz_test

import data.behavry.authz

ask(kind, model, role, permissions) := {
	"model": model,
	"agent_role": role,
	"agent": {"role": role, "permissions": permissions},
	"request": {"kind": kind},
	"model_ref": {"source": "local"},
}

cloud := object.union(ask("infer", "gpt-oss:120b-cloud", "internal", []), {"model_ref": {"source": "cloud"}})

test_an_agent_may_use_a_local_model if {
	authz.allow with input as ask("infer", "llama3.2", "internal", ["web:write"])
	count(authz.deny) == 0 with input as ask("infer", "llama3.2", "internal", ["web:write"])
}

test_an_agent_without_a_role_may_use_a_local_model if {
	authz.allow with input as ask("infer", "llama3.2", null, ["web:write"])
	count(authz.deny) == 0 with input as ask("infer", "llama3.2", null, ["web:write"])
}

test_every_agent_may_see_the_version if {
	every role in {"internal", "external"} {
		authz.allow with input as ask("read", null, role, ["web:read"])
		count(authz.deny) == 0 with input as ask("read", null, role, ["web:read"])
	}
}

test_lists_are_allowed if {
	authz.allow with input as ask("list", null, "internal", ["web:read"])
}

test_external_agents_may_not_use_models if {
	"agents with the role external may not use local models" in authz.deny with input as ask("infer", "llama3.2", "external", ["web:write"])
}

test_external_agents_are_shown_no_models if {
	count(authz.deny) == 1 with input as ask("list", "llama3.2", "external", ["web:read"])
}

test_managing_needs_the_permission if {
	count(authz.deny) == 1 with input as ask("manage", "llama3.2", "internal", ["web:write"])
	not authz.allow with input as ask("manage", "llama3.2", "internal", ["web:write"])
	authz.allow with input as ask("manage", "llama3.2", "internal", ["ollama:admin"])
	count(authz.deny) == 0 with input as ask("manage", "llama3.2", "internal", ["ollama:admin"])
}

test_cloud_models_are_denied if {
	count(authz.deny) == 1 with input as cloud
}

test_cloud_models_pass_once_allowed if {
	count(authz.deny) == 0 with input as cloud with authz.cloud_models_allowed as true
}

test_egress_is_denied if {
	not authz.allow with input as ask("egress", null, "internal", [])
	count(authz.deny) == 1 with input as ask("egress", null, "internal", [])
}

test_only_approved_models_once_there_is_a_list if {
	count(authz.deny) == 0 with input as ask("infer", "mistral", "internal", []) with authz.approved_models as {"mistral"}
	count(authz.deny) == 1 with input as ask("infer", "mistral:7b", "internal", []) with authz.approved_models as {"mistral"}
}

test_a_list_of_models_does_not_hide_the_version if {
	count(authz.deny) == 0 with input as ask("read", null, "internal", []) with authz.approved_models as {"mistral"}
}
