# What the author of seed.rego meant: three models, and none of them for external agents.
package behavry.authz_seed_test

import data.behavry.authz

ask(model, role) := {"mcp_server": "ollama-proxy", "model": model, "agent_role": role}

test_the_three_approved_models_pass if {
	every model in {"llama3.2", "codellama", "mistral"} {
		not authz.deny with input as ask(model, "internal")
	}
}

test_an_agent_without_a_role_may_use_them if {
	not authz.deny with input as ask("llama3.2", null)
}

test_another_model_is_denied if {
	authz.deny with input as ask("gpt-oss", "internal")
}

test_another_size_is_another_model if {
	authz.deny with input as ask("llama3.2:1b", "internal")
}

test_external_agents_are_denied if {
	authz.deny with input as ask("llama3.2", "external")
}

test_a_request_without_a_model_is_denied if {
	authz.deny with input as ask(null, "internal")
}

test_other_servers_are_not_meant if {
	not authz.deny with input as object.union(ask("gpt-oss", "external"), {"mcp_server": "other"})
}
