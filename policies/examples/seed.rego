package behavry.authz

# Only allow approved local models
deny if {
input.mcp_server == "ollama-proxy"
approved_models := {"llama3.2", "codellama", "mistral"}
not approved_models[input.model]
}

# Block local model usage for external-facing agents
deny if {
input.mcp_server == "ollama-proxy"
input.agent_role == "external"
}
