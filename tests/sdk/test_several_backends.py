"""One view of one and of three Ollamas, as the official clients read it."""
import ollama
import openai
import pytest

from stack import BINARY, CHAT, EMBED, NEEDS_JAVASCRIPT, Proxy, Running, call, clean_environment, javascript

HELD = [[CHAT, "mistral"], ["mistral", EMBED], ["codellama"]]
EVERY = {f"{name}:latest" for name in (CHAT, "mistral", EMBED, "codellama", "fast")}
POLICY = """package behavry.authz
deny contains "not this one" if {
	input.model != null
	not input.model in {"%s", "mistral", "%s", "codellama", "fast"}
}
""" % (CHAT, EMBED)


def holding(names):
    program = Running([BINARY, "simulate", "--listen", "127.0.0.1:0", "--models", ",".join(names)], clean_environment())
    return program, program.wait_for(r"simulator listening on (http://127\.0\.0\.1:\d+)")[1]


@pytest.fixture(scope="module", params=[1, 3], ids=["one backend", "three backends"])
def fleet(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    held = HELD if request.param == 3 else [sorted({name for names in HELD for name in names})]
    started = [holding(names) for names in held]
    config = folder / "proxy.toml"
    config.write_text('[[model]]\nname = "fast"\nalias = "mistral"\n[catalogue]\nloaded_s = 1\nstraggler_ms = 60000\n')
    proxy = Proxy(folder / "proxy", ",".join(url for _, url in started), POLICY, BEHAVRY_CONFIG=config)
    proxy.backends = request.param
    yield proxy
    proxy.stop()
    for program, _ in started:
        program.stop()


def headers(proxy, *permissions):
    token = proxy.mint(permissions=("web:read", "web:write", *permissions))
    return {"Authorization": f"Bearer {token}"}


def known(proxy):
    """The OpenAI list once the catalogue has read everything."""
    with proxy.program.news:
        for _ in range(600):
            listed = call(proxy.base + "/v1/models", headers=headers(proxy)).json["data"]
            # A list says what Ollama's own list says of a model until its details are read, which know of embeddings.
            embeds = any(entry["id"] == f"{EMBED}:latest" and entry.get("capabilities") == ["embedding"] for entry in listed)
            if embeds and all(entry.get("capabilities") and "loaded" in entry for entry in listed):
                return listed
            proxy.program.news.wait(0.1)
    raise AssertionError("the catalogue never read everything")


def test_openai_lists_and_retrieves_every_model_with_what_is_known_of_it(fleet):
    known(fleet)
    client = openai.OpenAI(base_url=fleet.base + "/v1", api_key=fleet.token)
    models = {model.id: model for model in client.models.list()}
    assert set(models) == EVERY
    assert models[f"{EMBED}:latest"].capabilities == ["embedding"]
    assert models["fast:latest"].alias_of == "mistral"
    assert all(model.object == "model" and model.owned_by for model in models.values())
    one = client.models.retrieve(EMBED)
    assert (one.capabilities, one.loaded) == (["embedding"], False)
    assert client.models.retrieve("fast").id == "fast:latest"


def test_ollama_lists_shows_and_runs_them(fleet):
    client = ollama.Client(host=fleet.base, headers=headers(fleet))
    assert {model.model for model in client.list().models} == EVERY
    for name in (CHAT, "codellama", "fast"):
        assert client.chat(name, [{"role": "user", "content": "hi"}]).message.content
        shown = client.show(name)
        assert shown.details.family and "completion" in shown.capabilities
    assert {"mistral:latest", "codellama:latest"} <= {model.model for model in client.ps().models}
    assert client.embed(EMBED, "a text").embeddings


def test_who_may_manage_sees_where_models_are(fleet):
    listed = call(fleet.base + "/v1/models", headers=headers(fleet, "ollama:admin")).json["data"]
    assert all(entry["backends"] for entry in listed)
    assert all("backends" not in entry for entry in known(fleet))


def test_what_was_just_used_is_loaded_in_every_list(fleet):
    known(fleet)
    ollama.Client(host=fleet.base, headers=headers(fleet)).chat("codellama", [{"role": "user", "content": "hi"}])
    client = openai.OpenAI(base_url=fleet.base + "/v1", api_key=fleet.token)
    assert client.models.retrieve("codellama").loaded is True
    for path, members, name in (("/v1/models", "data", "id"), ("/api/tags", "models", "name")):
        listed = call(fleet.base + path, headers=headers(fleet)).json[members]
        [one] = [entry for entry in listed if entry[name] == "codellama:latest"]
        assert one["loaded"] is True and one["context_length"] > 0, path


def test_the_version_is_one_and_who_may_manage_sees_each(fleet):
    seen = call(fleet.base + "/api/version", headers=headers(fleet)).json
    assert list(seen) == ["version"]
    of_each = call(fleet.base + "/api/version", headers=headers(fleet, "ollama:admin")).json.get("backends", {})
    assert len(of_each) == (fleet.backends if fleet.backends > 1 else 0)
    assert set(of_each.values()) <= {seen["version"]}


@NEEDS_JAVASCRIPT
def test_the_javascript_clients_read_the_same_view(fleet, request_id):
    listed = {entry["id"]: entry for entry in known(fleet)}
    for token, is_operator in ((fleet.token, False), (fleet.mint(permissions=("web:read", "web:write", "ollama:admin")), True)):
        view = javascript("ollama_view", fleet.base, token, request_id)
        assert view["family"] and "completion" in view["capabilities"] and view["version"].count(".") == 2, view
        of_openai = javascript("openai_view", fleet.base, token, request_id)
        for models in (view["models"], of_openai["models"]):
            assert {model["name"] for model in models} == EVERY
            for model in models:
                same = listed[model["name"]]
                # Ollama's own list has capabilities of its own, and takes an embedding model for another.
                assert model["capabilities"] == same["capabilities"] or (models is view["models"] and model["name"] == f"{EMBED}:latest")
                assert model["context_length"] == same["context_length"]
                assert model["loaded"] in (True, False)
                assert ("backends" in model) == is_operator
                assert model.get("alias_of") == same.get("alias_of")
        assert of_openai["one"]["name"].startswith(EMBED) and of_openai["one"]["capabilities"] == ["embedding"]
