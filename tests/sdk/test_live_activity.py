"""The Live Activity page in a real browser, over a real proxy with real streams."""
import re
import subprocess

import pytest

import browser
import stack
import streams

POLICY = 'package behavry.authz\n\ndeny contains "this model is not approved here" if input.model == "%s"\n' % stack.FORBIDDEN
MARKUP = '<img src=x onerror="document.title=1">'
CHAT_BODY = {"model": stack.CHAT, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.program() is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    running = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def slow_backend():
    """Streams that last: ten tokens a second, for minutes."""
    program, url = stack.simulator("--tokens-per-second", "10", "--tokens", "3000")
    yield url
    program.stop()


@pytest.fixture
def own_proxy(tmp_path, slow_backend):
    running = stack.Proxy(tmp_path / "p", slow_backend, POLICY)
    yield running
    running.stop()


@pytest.fixture
def page(chromium, own_proxy):
    opened = chromium.open(own_proxy.operator + "/")
    yield opened
    complaints = opened.complaints()
    opened.close()
    assert complaints == [], "the console is silent, and so is the security policy"


def ask(proxy, model, request_id, token=None):
    head = {"Authorization": f"Bearer {token or proxy.token}", "x-request-id": request_id}
    return stack.call(proxy.base + "/api/show", {"model": model}, head)


def in_row(body, *texts):
    """An expression: a visible row of a table's body that has all the texts."""
    has = " && ".join(f"row.innerText.includes({text!r})" for text in texts)
    return f"[...document.querySelectorAll('#{body} tr')].some((row) => !row.hidden && {has})"


def test_an_empty_page_says_how_to_begin(own_proxy, page):
    page.wait("!document.getElementById('empty').hidden")
    words = page.run("document.getElementById('first-request').textContent")
    assert own_proxy.base + "/api/chat" in words and "$BEHAVRY_JWT" in words and '"llama3.2"' in words
    ask(own_proxy, stack.CHAT, "first")
    page.wait("document.getElementById('empty').hidden && " + in_row("recent-rows", "sdk-agent", stack.CHAT, "POST /api/show"))


def test_a_running_stream_is_on_screen_and_when_it_ends_among_the_recent(own_proxy, page):
    running = streams.Streams(own_proxy.base, [(own_proxy.token, stack.CHAT)])
    try:
        page.wait(in_row("running-rows", "sdk-agent", stack.CHAT, "POST /api/chat", "allow", "answering"))
        chunks = "Number(document.querySelector('#running-rows tr').cells[7].textContent)"
        first = page.wait(chunks)
        page.wait(f"{chunks} > {first}")
        speed = page.wait("Number(document.querySelector('#running-rows tr').cells[6].textContent)")
        assert speed >= 1, "ten a second, as far as the machine has time"
        page.wait("document.querySelector('#tile-running b').textContent === '1'")
        page.wait("document.querySelector('#tile-running small').textContent === 'by 1 agent, 0 waiting for a first token'")
        page.wait("Number(document.querySelector('#tile-tokens b').textContent) >= 1")  # while it flows, not only at its end
        page.wait("document.querySelector('#connection').dataset.state === 'live'")
        page.wait("document.querySelector('#backends').innerText.includes('1 in flight')")
    finally:
        running.stop()
    page.wait("document.querySelectorAll('#running-rows tr').length === 0")
    page.wait(in_row("recent-rows", "sdk-agent", stack.CHAT, "allow", "client abort", "ollama-api · ollama-proxy"))


def test_a_refusal_is_shown_with_its_reason_and_its_whole_record(own_proxy, page):
    ask(own_proxy, stack.FORBIDDEN, "denied-1")
    page.wait(in_row("recent-rows", "deny", "this model is not approved here", "refused"))
    page.run("document.querySelector('#recent-rows button').focus()")
    page.press("Enter", text="\r")
    page.wait("document.getElementById('details').open")
    record = page.run("Object.fromEntries([...document.querySelectorAll('#members dt')].map((dt) => [dt.textContent, dt.nextSibling.textContent]))")
    expected = {"tool_name": "ollama-api", "mcp_server": "ollama-proxy", "action": "POST", "policy_result": "deny",
                "extra.request_id": "denied-1", "extra.phase": "final", "extra.model": stack.FORBIDDEN}
    assert {name: record.get(name) for name in expected} == expected
    written = own_proxy.exchange("denied-1").final
    assert record["event_hash"] == written["event_hash"], "it is the audit's own record"
    page.press("Escape")
    page.wait("!document.getElementById('details').open")


def test_names_that_carry_markup_are_inert(own_proxy, page):
    made = subprocess.run([stack.BINARY, "token", "mint", "--agent", MARKUP, "--permission", "web:read", "--permission", "web:write"],
                          env=own_proxy.environment, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    running = streams.Streams(own_proxy.base, [(token, stack.CHAT)])
    try:
        page.wait(in_row("running-rows", MARKUP))
    finally:
        running.stop()
    ask(own_proxy, stack.CHAT, "<script>document.title=2</script>", token)
    page.wait(in_row("recent-rows", MARKUP, "POST /api/show"))
    page.run("document.querySelector('#recent-rows button').click()")
    page.wait("document.getElementById('members').innerText.includes('<script>document.title=2</script>')")
    assert page.run("document.title") == "Live Activity · Ollama proxy"
    assert page.run("document.querySelectorAll('main img, dialog img, main script, dialog script').length") == 0
    assert not any(url.endswith("/x") for url in page.urls())


def test_the_page_asks_nobody_but_the_proxy(own_proxy, page):
    ask(own_proxy, stack.CHAT, "any")
    page.wait(in_row("recent-rows", stack.CHAT))
    asked = page.urls()
    assert len(asked) >= 4, "the page, its style, its script, its feed"
    assert [url for url in asked if not url.startswith((own_proxy.operator + "/", "data:"))] == []


def test_keys_filter_and_pause(own_proxy, page):
    ask(own_proxy, stack.CHAT, "k1")
    ask(own_proxy, stack.FORBIDDEN, "k2")
    page.wait(in_row("recent-rows", "deny") + " && " + in_row("recent-rows", stack.CHAT))
    page.press("/", "Slash", "/")
    assert page.run("document.activeElement.id") == "filter" and page.run("document.activeElement.value") == ""
    page.type("DENY show")
    assert page.run(in_row("recent-rows", stack.FORBIDDEN)) and not page.run(in_row("recent-rows", stack.CHAT))
    page.type(" nobody")
    assert page.run("!document.getElementById('nothing').hidden")
    page.press("Escape")
    assert page.run(in_row("recent-rows", stack.CHAT)) and page.run("document.activeElement.tagName") == "BODY"

    page.run("document.querySelector('input[value=deny]').click()")
    assert not page.run(in_row("recent-rows", stack.CHAT)) and page.run(in_row("recent-rows", stack.FORBIDDEN))
    page.run("document.querySelector('input[value=all]').click(); document.activeElement.blur()")

    page.press(" ", "Space", " ")
    assert page.run("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    ask(own_proxy, stack.CHAT, "k3")
    page.wait("document.getElementById('waiting').textContent === '1 more since'")
    assert page.run("document.querySelectorAll('#recent-rows tr').length") == 2
    page.press(" ", "Space", " ")
    page.wait("document.querySelectorAll('#recent-rows tr').length === 3")
    assert page.run("document.getElementById('waiting').textContent") == ""


def test_a_screen_reader_finds_its_way(own_proxy, page):
    running = streams.Streams(own_proxy.base, [(own_proxy.token, stack.CHAT)])
    try:
        ask(own_proxy, stack.CHAT, "heard")
        page.wait(in_row("running-rows", stack.CHAT) + " && " + in_row("recent-rows", stack.CHAT))
        page.ask("Accessibility.enable")
        nodes = [node for node in page.ask("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    finally:
        running.stop()
    by_role = {}
    for node in nodes:
        by_role.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert len(by_role["banner"]) == len(by_role["main"]) == len(by_role["contentinfo"]) == len(by_role["search"]) == 1
    assert sorted(by_role["table"]) == sorted(["Requests that wait or are being answered, newest first",
                                               "Requests that have ended, newest first, each as the audit has it"])
    assert len(by_role["columnheader"]) == 19 and "Decision" in by_role["columnheader"]
    assert by_role["heading"][0] == "Live Activity"
    for role in ("button", "link", "searchbox", "radio", "region"):
        assert all(name.strip() for name in by_role[role]), f"{role}: {by_role[role]}"
    # Who listens is told a sentence now and then, and not each of the rows.
    assert page.run("[...document.querySelectorAll('[aria-live], [role=status]')].map((node) => node.id).sort().join()") == "spoken,waiting"
    page.wait("/^\\d+ requests? ended/.test(document.getElementById('spoken').textContent)")


CONTRASTS = r"""
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => { const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
  const ground = (node) => { for (; node; node = node.parentElement) { const color = rgba(getComputedStyle(node).backgroundColor); if (color[3] === 255) return color; } return [255, 255, 255, 255]; };
  document.getAnimations().forEach((animation) => animation.finish instanceof Function && animation.effect.getTiming().iterations !== Infinity && animation.finish());
  const weak = [];
  for (const node of document.querySelectorAll("body *")) {
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!says || !node.checkVisibility({ visibilityProperty: true }) || node.closest("noscript")) continue;
    const [a, b] = [light(rgba(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) weak.push(`${node.tagName}.${node.className} ${node.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return weak;
})()
"""


OUTLINE = CONTRASTS.replace("const weak = [];", """
  const blue = rgba(getComputedStyle(document.documentElement).getPropertyValue("--blue"));
  const grounds = ["--panel", "--ground"].map((name) => rgba(getComputedStyle(document.documentElement).getPropertyValue(name)));
  return Math.min(...grounds.map((ground) => { const [a, b] = [light(blue), light(ground)].sort((x, y) => y - x); return (a + .05) / (b + .05); }));
  const weak = [];""")


@pytest.fixture
def busy(tmp_path):
    """A proxy with everything that there is to see: a slot that is taken and one who waits for it, a backend that is drained, one whose
    breaker is open for a model, and alerts of it."""
    started = [stack.simulator("--tokens-per-second", "10", "--tokens", "3000"), stack.simulator()]
    (tmp_path / "proxy.toml").write_text("[health]\nprobe_s = 0\nfailures = 1\nrest_s = 60\n[failover]\nbackends = 1\n")
    urls = ",".join(url for _, url in started)
    proxy = stack.Proxy(tmp_path / "p", urls, POLICY, BEHAVRY_CONFIG=tmp_path / "proxy.toml")
    running = None
    try:
        proxy.command("backend", "drain", "ollama-2")
        head = {"Authorization": f"Bearer {proxy.token}"}
        assert stack.call(proxy.base + "/api/chat", CHAT_BODY | {"model": "fault-500-error"}, head).status == 500
        ask(proxy, stack.FORBIDDEN, "busy-1")
        ask(proxy, stack.CHAT, "busy-2")
        running = streams.Streams(proxy.base, [(proxy.token, stack.CHAT)] * 2)
        running.wait(1)
        yield proxy
    finally:
        if running:
            running.stop()
        proxy.stop()
        for program, _ in started:
            program.stop()


ALL_OF_IT = " && ".join([
    in_row("running-rows", stack.CHAT, "answering"), in_row("running-rows", stack.CHAT, "queued", "for a free slot"),
    in_row("recent-rows", "deny"), "document.querySelectorAll('#alert-list li').length >= 1",
    "document.getElementById('queues').innerText.includes('1 waits')", "document.getElementById('backends').innerText.includes('drained')",
])


def test_what_waits_and_what_is_out_of_use_is_said_in_words(chromium, busy):
    page = chromium.open(busy.operator + "/")
    try:
        page.wait(ALL_OF_IT)
        page.wait("document.getElementById('queue-count').textContent === '1'")
        page.wait("/^the first for \\d/.test(document.querySelector('#queues .note').textContent)")
        page.wait("document.querySelector('#tile-running small').textContent === 'by 1 agent, 0 waiting for a first token, 1 queued'")
        first, second = page.run("[...document.querySelectorAll('#backends li')].map((li) => [...li.querySelectorAll('.tag')].map((tag) => tag.textContent))")
        # It rests for a minute at most, and is half open then: a page may be slower than that.
        assert first in (["up", "breaker open for fault-500-error"], ["up", "breaker half open for fault-500-error"])
        assert second == ["up", "drained"]
        page.wait(f"[...document.querySelectorAll('#backends .chip')].some((chip) => chip.textContent === '{stack.CHAT} · loaded')")
        alert = page.run("document.querySelector('#alert-list').innerText")
        assert "breaker open" in alert and "gets no requests for fault-500-error" in alert
        # The queue is found by its state, too.
        page.run("document.getElementById('filter').value = 'queued'; document.getElementById('filter').dispatchEvent(new Event('input'))")
        page.wait("document.querySelectorAll('#running-rows tr').length === 1")
        assert page.run(in_row("running-rows", "queued"))
        busy.command("backend", "undrain", "ollama-2")
        page.wait("!document.getElementById('backends').innerText.includes('drained')")
    finally:
        page.close()


def test_a_screen_reader_hears_the_same_states_as_are_seen(chromium, busy):
    page = chromium.open(busy.operator + "/")
    try:
        page.wait(ALL_OF_IT)
        tree = page.accessibility()
        said = [node["name"] for node in tree if node["role"] == "StaticText"]
        for words in ("answering", "queued", "for a free slot", "drained", "breaker open", "1 waits"):
            assert words in said, words
        assert {"breaker open for fault-500-error", "breaker half open for fault-500-error"} & set(said)
        lists = {node["name"].split(" ")[0] for node in tree if node["role"] == "list"}
        assert {"Backends", "Queue", "Alerts"} <= lists, lists
        for node in tree:
            if node["role"] in ("button", "link", "searchbox", "radio", "region", "table", "list", "dialog", "group"):
                assert node["name"].strip(), node
        # What is only drawn is not read out.
        assert not any(node["role"] in ("image", "img", "graphics-document") and not node["name"].strip() for node in tree)
    finally:
        page.close()


# What would be called every ten seconds is kept, to be called when the test says so.
KEPT_INTERVALS = "window.kept = []; window.setInterval = (call, ms) => { kept.push({ call, ms }); return kept.length; };"
WATCHED = """
window.changes = 0;
for (const node of document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]'))
  new MutationObserver((all) => { window.changes += all.length; }).observe(node, { childList: true, characterData: true, subtree: true });
"""


def test_what_is_read_out_is_a_sentence_at_times_however_many_requests_come(chromium, own_proxy):
    page = chromium.open(own_proxy.operator + "/", before=KEPT_INTERVALS)
    try:
        page.wait("document.querySelector('#connection').dataset.state === 'live'")
        [pause_ms] = page.run("kept.map(({ ms }) => ms)")
        assert pause_ms >= 5000
        page.run(WATCHED)
        for number in range(40):
            ask(own_proxy, stack.CHAT if number % 4 else stack.FORBIDDEN, f"flood-{number}")
        page.wait("document.getElementById('recent-count').textContent === '40'")
        assert page.run("changes") == 0, "nothing is said of each"
        page.run("kept[0].call()")
        assert page.run("document.getElementById('spoken').textContent") == "40 requests ended, 10 of them refused."
        assert page.run("changes") == 1
        page.run("kept[0].call()")
        assert page.run("changes") == 1, "nothing new is nothing said"
    finally:
        page.close()


# Where the focus is, and whether it can be seen there: on the element itself, or on what stands for a radio button.
FOCUS = """
(() => {
  const node = document.activeElement;
  if (node === document.body) return null;
  const shown = node.type === "radio" ? node.nextElementSibling : node;
  const style = getComputedStyle(shown), box = shown.getBoundingClientRect();
  const covered = document.querySelector("header").getBoundingClientRect().bottom;
  return {
    what: node.id || node.getAttribute("aria-labelledby") || node.value || node.textContent.trim(),
    outline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    inside: box.bottom > 0 && box.top < innerHeight && box.width > 0 && box.height > 0,
    free: node.closest("header") !== null || node.classList.contains("skip") || box.bottom > covered,
  };
})()
"""


def test_the_tabulator_goes_through_the_page_in_its_order_and_the_focus_is_seen(chromium, busy):
    page = chromium.open(busy.operator + "/")
    try:
        page.wait(ALL_OF_IT)
        page.press(" ", "Space", " ")  # paused: nothing moves under the focus
        passed = []
        while (focus := (page.press("Tab"), page.run(FOCUS))[1]) is not None and len(passed) < 40:
            passed.append(focus)
        names = [focus["what"] for focus in passed]
        assert names[:6] == ["Skip to the recent requests", "filter", "pause", "dismiss", "running-title", "all"], names
        assert names[6] == "recent-title" and names[-2:] == ["Metrics", "JSON"], names
        assert len(names) == 9 + page.run("document.querySelectorAll('#recent-rows button').length"), "each row's record, and nothing twice"
        assert [focus for focus in passed if not (focus["outline"] and focus["inside"] and focus["free"])] == []
        # And back again, from the first link of the page to its end.
        page.run("document.querySelector('.skip').focus()")
        page.press("Enter", text="\r")
        assert page.run("document.activeElement.id") == "recent-title"
    finally:
        page.close()


def test_a_dialog_keeps_the_focus_and_gives_it_back(chromium, busy):
    page = chromium.open(busy.operator + "/")
    try:
        page.wait(ALL_OF_IT)
        page.run("document.querySelector('#recent-rows button').focus()")
        name = page.run("document.activeElement.getAttribute('aria-label')")
        page.press("Enter", text="\r")
        page.wait("document.getElementById('details').open")
        dialog = [node for node in page.accessibility() if node["role"] == "dialog"]
        assert [node["name"] for node in dialog] == ["Record"]
        for _ in range(3):
            page.press("Tab")
            assert page.run("document.activeElement === document.body || document.getElementById('details').contains(document.activeElement)")
        page.press("Escape")
        page.wait("!document.getElementById('details').open")
        assert page.run("document.activeElement.getAttribute('aria-label')") == name
    finally:
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_colour_schemes(chromium, busy, scheme):
    page = chromium.open(busy.operator + "/", scheme=scheme)
    try:
        page.wait(ALL_OF_IT)
        page.wait("document.querySelector('#connection').dataset.state === 'live'")
        ground = [int(part) for part in re.findall(r"\d+", page.run("getComputedStyle(document.documentElement).backgroundColor"))]
        assert (sum(ground) > 600) == (scheme == "light"), ground
        assert page.run(CONTRASTS) == [], "WCAG AA: 4.5 to 1"
        page.run("document.getElementById('pause').click()")
        page.wait("document.querySelector('#connection').dataset.state === 'paused'")
        for state in ("connecting", "draining", "lost"):
            page.run(f"document.querySelector('#connection').dataset.state = '{state}'")
            assert page.run(CONTRASTS) == [], state
        page.run("document.querySelector('#recent-rows button').click()")
        page.wait("document.getElementById('details').open")
        assert page.run(CONTRASTS) == [], "a record"
        # The focus, and the borders of what can be operated, need 3 to 1.
        assert page.run(OUTLINE) >= 3
    finally:
        page.close()


def test_who_asked_for_less_motion_gets_none(chromium, own_proxy):
    page = chromium.open(own_proxy.operator + "/", reduced_motion=True)
    try:
        ask(own_proxy, stack.CHAT, "still")
        page.wait(in_row("recent-rows", stack.CHAT))
        assert page.run("document.getAnimations().length") == 0
    finally:
        page.close()


def test_a_browser_with_the_password_sees_the_feed(chromium, tmp_path, slow_backend):
    """A header cannot be set on an EventSource; a password that the browser has goes with it by itself."""
    secret = "0123456789abcdef" * 4
    (tmp_path / "token").write_text(secret)
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "proxy.toml").write_text(f'[operator]\ncredential_file = "{tmp_path}/token"\n')
    proxy = stack.Proxy(tmp_path / "p", slow_backend, POLICY, BEHAVRY_CONFIG=tmp_path / "proxy.toml")
    try:
        assert stack.call(proxy.operator + "/").status == 401
        page = chromium.open(proxy.operator.replace("http://", f"http://operator:{secret}@") + "/")
        try:
            page.wait("document.querySelector('#connection').dataset.state === 'live'")
            ask(proxy, stack.CHAT, "guarded")
            page.wait(in_row("recent-rows", stack.CHAT))
        finally:
            page.close()
    finally:
        proxy.stop()


FRAMES = """
new Promise((done) => {
  const times = [];
  const frame = (now) => { times.push(now); if (now - times[0] < %d) requestAnimationFrame(frame); else done(times); };
  requestAnimationFrame(frame);
})
"""


def test_five_hundred_running_streams_do_not_slow_the_page(own_proxy, page):
    # The first loads the model, and until it is loaded the others would wait, of which an agent may have 128.
    first = streams.Streams(own_proxy.base, [(own_proxy.token, stack.CHAT)])
    running = None
    try:
        first.wait(1)
        running = streams.Streams(own_proxy.base, [(own_proxy.token, stack.CHAT)] * 499)
        running.wait(499)
        page.wait("document.querySelector('#running table').ariaRowCount === '501'")
        scroll = "document.querySelector('#running .scroll').scrollTop"
        page.run(scroll + " = 1e9")
        page.wait("[...document.querySelectorAll('#running-rows tr')].at(-1).ariaRowIndex === '501'")
        page.run(scroll + " = 0")
        page.wait("document.querySelector('#running-rows tr').ariaRowIndex === '2'")
        changed = page.run("document.querySelector('#running-rows').innerText")
        before = page.metrics()
        times = page.run(FRAMES % 5000)
        after = page.metrics()
        assert page.run("document.querySelector('#running-rows').innerText") != changed, "all the time they were shown anew"
    finally:
        for some in (first, running):
            if some:
                some.stop()
    steps = sorted(b - a for a, b in zip(times, times[1:]))
    seconds = (times[-1] - times[0]) / 1000
    spent = {name: (after[name] - before[name]) * 1000 / seconds for name in ("TaskDuration", "ScriptDuration", "LayoutDuration", "RecalcStyleDuration")}
    print(f"\n500 streams: {len(steps) / seconds:.1f} frames/s, median {steps[len(steps) // 2]:.1f} ms, p99 {steps[int(len(steps) * .99)]:.1f} ms, "
          f"longest {steps[-1]:.1f} ms; ms of work a second: " + ", ".join(f"{name} {value:.0f}" for name, value in spent.items()))
    assert len(steps) / seconds >= 30
