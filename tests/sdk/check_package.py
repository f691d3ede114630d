"""Checks an evidence package as somebody would who has only the description of the format, and Python.

    check_package.py PACKAGE.zip TRUST_ANCHOR.json

Not made from our Rust. Ed25519 is RFC 8032, section 6, in its plainest form. Prints what was checked; exits with 1 at the first thing
that is wrong.
"""
import base64
import hashlib
import json
import sys
import zipfile

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P


def add(a, b):
    x1, y1, z1, t1 = a
    x2, y2, z2, t2 = b
    e, f = (y1 - x1) * (y2 - x2) % P, (y1 + x1) * (y2 + x2) % P
    c, d = 2 * t1 * t2 * D % P, 2 * z1 * z2 % P
    e, f, g, h = f - e, d - c, d + c, f + e
    return e * f % P, g * h % P, f * g % P, e * h % P


def times(scalar, point):
    total = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point = add(point, point)
        scalar >>= 1
    return total


def point(text):
    y = int.from_bytes(text, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert (x * x - square) % P == 0, "not a point"
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P


BASE = point((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))


def signed(key, message, signature):
    r, s = signature[:32], int.from_bytes(signature[32:], "little")
    h = int.from_bytes(hashlib.sha512(r + key + message).digest(), "little") % L
    left, right = times(s, BASE), add(point(r), times(h, point(key)))
    same = (left[0] * right[2] - right[0] * left[2]) % P == 0 and (left[1] * right[2] - right[1] * left[2]) % P == 0
    return s < L and same


def compact(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha(data):
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


def merkle(hashes):
    level = [sha("leaf:" + h) for h in hashes]
    while len(level) > 1:
        level = [
            sha("node:" + level[i] + level[i + 1]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)
        ]
    return "sha256:" + (level[0] if level else sha(b""))


def must(what, holds):
    if not holds:
        sys.exit(f"wrong: {what}")


def main(package, anchor):
    archive = zipfile.ZipFile(package)
    must("archive", archive.testzip() is None)
    folders = {name.split("/")[0] for name in archive.namelist()}
    must("one folder apr-<id>", len(folders) == 1 and folders.pop().startswith("apr-"))
    members = {name.split("/")[1]: json.loads(archive.read(name)) for name in archive.namelist()}
    manifest, events = members["manifest.json"], members["timeline.json"]
    anchor = json.load(open(anchor))
    must("anchor", anchor["schema"] == "behavry.trust_anchor.v1")
    keys = {key["kid"]: key["public_key"] for key in anchor["keys"]}
    for kid, text in keys.items():
        must("hint", kid == "sha256:" + sha(text)[:16])
    keys = {kid: base64.b64decode(text) for kid, text in keys.items()}

    body = {name: value for name, value in manifest.items() if name != "signature"}
    key = keys[manifest["signer_kid"]]
    must("manifest's signature", signed(key, compact(body), base64.b64decode(manifest["signature"])))
    must("schema", manifest["schema"] == "behavry.apr_evidence_package.v1" and manifest["package_version"] == "1.1")
    must("count", manifest["event_count"] == len(events))
    must("root", manifest["root_hash"] == merkle([event["event_hash"] for event in events]))

    heads, last = {}, ""
    for event in events:
        agent, previous, last = event["agent_id"], event["previous_hash"], event["event_hash"]
        must("link", previous == heads.get(agent) if agent is not None else previous is None)
        heads[agent] = last
        hashed = {k: v for k, v in event.items() if k not in ("event_hash", "previous_hash", "signature", "signer_kid")}
        must("event's hash", last == sha(compact(hashed) + (previous or "GENESIS").encode()))
        log = hashed["extra"].pop("log")
        must("the log's own hash", log["event_hash"] == sha(compact(hashed) + log["previous_hash"].encode()))
        payload = {
            "event_hash": last,
            "previous_hash": previous or "GENESIS",
            "tenant_id": event.get("tenant_id") or "",
            "timestamp": event["timestamp"],
        }
        signature = base64.b64decode(event["signature"])
        must("event's signature", signed(keys[event["signer_kid"]], compact(payload), signature))
    links = [{"event_id": e["id"], "hash": e["event_hash"], "previous_hash": e["previous_hash"], "verified": True} for e in events]
    must("hash chain", members["hash_chain.json"] == links and manifest["chain_root_hash"] == last)
    print(f"{len(events)} events of {len([a for a in heads if a is not None])} agents hold")


main(*sys.argv[1:])
