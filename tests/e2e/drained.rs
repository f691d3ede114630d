//! A drained backend: we go on looking at it, and send it nothing that anybody asks for, unless it is named.

use behavry_ollama_proxy::simulator::Simulator;
use serde_json::{Value, json};

use crate::client::Request;
use crate::fleet::{holding, lists_are_read, tables};
use crate::house::{House, PATIENCE, Plan};

const ADMIN: &[&str] = &["web:read", "web:write", "ollama:admin"];

fn asked(backend: &Simulator, target: &str) -> usize {
    let clients = backend.seen().into_iter().filter(|seen| seen.header("x-request-id") != Some("catalogue"));
    clients.filter(|seen| seen.target == target).count()
}

fn names(list: &Value) -> Vec<&str> {
    let entries = list["models"].as_array().or(list["data"].as_array()).expect("a list");
    entries.iter().filter_map(|entry| entry["name"].as_str().or(entry["id"].as_str())).collect()
}

#[tokio::test]
async fn a_drained_backend_is_in_no_list_and_gets_no_pull_and_is_looked_at_all_the_same() {
    let (a, b) = (holding(&["one"]).await, holding(&["two"]).await);
    let config = format!(
        "{}[catalogue]\nrefresh_s = 1\nloaded_s = 1\nstraggler_ms = 60000\n",
        tables([&a, &b].map(|each| (each.url(), "")))
    );
    let house = House::with(Plan { config, ..Plan::default() }).await;
    lists_are_read(&house).await;
    let token = house.token_with(&[], ADMIN);
    let send = |request: Request| house.send(request.bearer(&token));
    house.command_backend("drain", "b").await;
    // Looks of our own go on: who undrains it finds it known.
    b.forget();
    let looks = |seen: &[behavry_ollama_proxy::simulator::Seen]| {
        seen.iter().any(|seen| seen.target == "/api/tags" && seen.header("x-request-id") == Some("catalogue"))
    };
    b.wait_for(PATIENCE, looks).await.expect("a look");
    for path in ["/api/tags", "/v1/models", "/api/ps", "/api/version"] {
        let reply = send(Request::get(path)).await;
        assert_eq!(reply.status, 200, "{path}");
        if ["/api/tags", "/v1/models"].contains(&path) {
            assert_eq!(names(&reply.json()), ["one:latest"], "{path}: what it has cannot be had now");
        }
        assert_eq!((asked(&a, path), asked(&b, path)), (1, 0), "{path}");
    }
    let pull = json!({ "model": "new" });
    let reply = send(Request::post("/api/pull", pull.clone())).await;
    let lines: Vec<Value> = reply.lines().iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let said = |status: &str| lines.iter().any(|line| line["status"] == status);
    assert!(said("backend b (2 of 2), left out since it is drained"), "{}", reply.text());
    assert_eq!(lines.last().expect("lines"), &json!({ "status": "success", "left_out": ["b"] }));
    let whole = send(Request::post("/api/pull", json!({ "model": "new", "stream": false }))).await;
    assert_eq!((whole.status, whole.json()), (200, json!({ "status": "success", "left_out": ["b"] })));
    assert_eq!((asked(&a, "/api/pull"), asked(&b, "/api/pull")), (2, 0));
    // Who names it means it: a new model may be fetched before it is used again.
    let named = send(Request::post("/api/pull", pull.clone()).header("x-behavry-backend", "b")).await;
    assert_eq!((named.status, asked(&b, "/api/pull")), (200, 1));

    house.command_backend("drain", "a").await;
    for request in [Request::get("/api/tags"), Request::get("/api/version"), Request::post("/api/pull", pull)] {
        let path = request.path.clone();
        let reply = send(request).await;
        assert_eq!((reply.status, reply.code().as_str()), (503, "no_backend"), "{path}");
    }
    house.command_backend("undrain", "b").await;
    let list = send(Request::get("/api/tags")).await.json();
    assert!(names(&list).contains(&"two:latest"), "{list}");
}

#[tokio::test]
async fn the_backend_that_the_configuration_names_for_management_is_not_managed_while_it_is_drained() {
    let (a, b) = (holding(&["m"]).await, holding(&["m"]).await);
    let config = format!("[fleet]\nmanage = \"a\"\n{}", tables([&a, &b].map(|each| (each.url(), ""))));
    let house = House::with(Plan { config, ..Plan::default() }).await;
    let token = house.token_with(&[], ADMIN);
    let copy = || Request::post("/api/copy", json!({ "source": "m", "destination": "mine" })).bearer(&token);
    house.command_backend("drain", "a").await;
    let reply = house.send(copy()).await;
    assert_eq!((reply.status, reply.code().as_str()), (503, "no_backend"));
    assert_eq!(house.send(copy().header("x-behavry-backend", "a")).await.status, 200);
}
