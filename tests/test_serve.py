"""Tests of serve.py."""

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import gan
import generate
import plots
import serve
from conftest import HERE, make, mistake, pixels_of


def app_of(path, **fields):
    trained = generate.open_generator(path, "cpu")
    vars(trained).update(fields)
    return serve.App(trained)


@pytest.fixture(scope="module")
def server(trained):
    log = trained / "runs/a/log.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "loss_D": NaN, "loss_G": 1.5, "note": "x"}\n{"step": 10, "lo')
    (trained / "runs/a/samples/step-secret.png").write_text("not of the run")
    server = serve.Server(app_of(trained / "runs/a"))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, path, method="GET", headers=None, body=None):
    """(status, headers, content) of one request over a connection of its own."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def ask_json(server, path):
    status, headers, content = ask(server, path)
    assert status == 200 and headers["Content-Type"] == "application/json"
    return json.loads(content, parse_constant=pytest.fail)            # NaN is no JSON


def shown(server, path):
    """The pixels that a PNG from the server holds, (H, W, C)."""
    status, headers, content = ask(server, path)
    assert status == 200 and headers["Content-Type"] == "image/png", content
    return np.asarray(Image.open(io.BytesIO(content)))


def raw(server, sent, wait=5.0):
    """What comes back for bytes that need not be a request."""
    with socket.create_connection(server.server_address[:2], timeout=wait) as connection:
        connection.sendall(sent)
        with contextlib.suppress(TimeoutError, ConnectionError):
            got = b""
            while part := connection.recv(65536):
                got += part
    return got


def test_images_of_the_page_equal_the_files(server, trained, at_runs, tmp_path):
    info = ask_json(server, "/info")
    assert (info["name"], info["step"], info["height"], info["width"], info["n"]) == ("a", 8, 9, 12, 32)
    make("runs/a", "--seed", "7", "--n", "40", "--out", tmp_path / "files", "--truncation", "0.75")
    grid = shown(server, "/samples?seed=7&psi=0.75")
    assert grid.shape == (4 * 9, 8 * 12, 3)
    for k in range(40):
        expected = pixels_of(tmp_path / f"files/seed7-{k:06d}.png")
        if k < 32:
            assert np.array_equal(grid[k // 8 * 9:][:9, k % 8 * 12:][:, :12], expected)
        assert np.array_equal(shown(server, f"/image?seed=7&k={k}&psi=0.75"), expected)
        assert k > 2 or np.array_equal(shown(server, f"/image?seed=7&k={k}&psi=0.75&d=0,0"), expected)


def test_sliders_and_walks_of_the_page(server):
    trained = server.app.trained
    G, (V, _) = gan.load_generator(trained.path), generate.principal_directions(trained.G)
    a, b = generate.latents(2, [5], 5)[0] + 1.5 * V[0] - 2 * V[2], generate.latents(3, [6], 5)[0]

    def pixels(z):
        return generate.draw(G, z[None])[0].permute(1, 2, 0).numpy().astype(int)

    moved = shown(server, "/image?seed=2&k=5&psi=1&d=1.5,0,-2")
    assert np.abs(moved - pixels(a)).max() <= 1 and np.abs(moved - pixels(generate.latents(2, [5], 5)[0])).max() > 3
    end = "&to_seed=3&to=6"
    for t in (0.0, 0.3, 1.0):
        found = shown(server, f"/image?seed=2&k=5&psi=1&d=1.5,0,-2{end}&t={t}")
        assert np.abs(found - pixels(generate.slerp(a, b, t))).max() <= 1
    frames = ask_json(server, "/info")["frames"]
    strip = shown(server, "/walk?seed=2&k=5&psi=1&d=1.5,0,-2" + end)
    assert frames == 48 and strip.shape == (6 * 9, 8 * 12, 3)
    for j in (0, 1, 20, 47):
        frame = strip[j // 8 * 9:][:9, j % 8 * 12:][:, :12]
        assert np.abs(frame - pixels(generate.slerp(a, b, j / 47))).max() <= 1
    status, headers, content = ask(server, "/walk.gif?seed=2&k=5&psi=1" + end)
    with Image.open(io.BytesIO(content)) as im:
        assert headers["Content-Type"] == "image/gif" and im.n_frames > 40 and im.info["loop"] == 0
    large = app_of(trained.path, G=gan.Generator(512, 1, 5, 1, 1).eval().requires_grad_(False))       # fewer frames
    with Image.open(io.BytesIO(large.answer("/walk.gif", "seed=2&k=5&psi=1" + end)[1])) as im:
        assert im.n_frames <= large.frames < 48
    large.worker.shutdown()


def test_the_training_tab_gets_the_log_and_grids_by_index(server, trained):
    rows = ask_json(server, "/log")
    assert rows[-1] == {"step": 9, "loss_G": 1.5} and {"loss_D", "wasserstein"} <= rows[0].keys()
    steps = ask_json(server, "/history")
    assert steps == sorted(steps) and steps[-1] == 8 and len(steps) >= 2
    for k, step in enumerate(steps):
        status, headers, content = ask(server, f"/grid?i={k}")
        assert content == (trained / f"runs/a/samples/step-{step:07d}.png").read_bytes()
    assert ask(server, f"/grid?i={len(steps)}")[0] == 404
    alone = app_of(trained / "runs/a", folder=None, flags=None)
    assert [json.loads(alone.answer(path, "")[1]) for path in ("/log", "/history")] == [[], []]
    with pytest.raises(serve.HTTPError):
        alone.answer("/grid", "i=0")
    assert json.loads(alone.answer("/info", "")[1])["run"] is False
    alone.worker.shutdown()


def test_a_long_log_is_thinned_and_keeps_rare_values(server, tmp_path, monkeypatch):
    rows = [{"step": 50 * k, "loss_D": k / 7} | ({"fid": 100 / k} if k % 100 == 0 else {}) for k in range(1, 6002)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(server.app.trained, "folder", tmp_path)
    shown = ask_json(server, "/log")
    assert [row for row in shown if "fid" in row] == [row for row in rows if "fid" in row] and shown[-1] == rows[-1]
    assert 1000 < len(shown) < 1700 and shown == sorted(shown, key=lambda row: row["step"])


POINT = "seed=1&k=2&psi=1"
WRONG = {
    404: ["/nothing", "/../runs/a/args.txt", "/runs/a/checkpoint.pt", "//etc/passwd", "/page", "/%2e%2e/args.txt",
          "/answer", "/__init__", "/grid?i=99"],
    400: ["/grid", "/grid?i=../args.txt", "/grid?i=-1", "/grid?i=0&i=1", "/grid?i=1.5", "/grid?i=", "/?x",
          "/grid?i=0&path=/etc/passwd", "/samples?seed=%00&psi=1", "/samples?seed=%ff&psi=1", "/log?x=1",
          "/samples?seed=0&psi=1&n=9", "/log?" + "&".join(f"x{k}=1" for k in range(40)), "/image",
          "/image?seed=1&k=2", f"/walk?{POINT}", f"/walk?{POINT}&to=3&to_seed=1&t=0.5",
          *(f"/image?{POINT}&d={d}" for d in ("9", "nan", "1,,1", "1,1,1,1,1,1", ",".join("1" * 11))),
          *(f"/image?{POINT}&{end}" for end in ("t=0.5", "to=3", "to_seed=3", "to=3&to_seed=1&t=1.5",
                                                  "to=3&to_seed=1&t=inf", "to=x&to_seed=1")),
          "/image?seed=-1&k=2&psi=1", "/image?seed=4294967296&k=2&psi=1", "/image?seed=1&k=1000000&psi=1",
          "/image?seed=1&k=2&psi=5", "/image?seed=1&k=2&psi=1e999", "/image?seed=1&k=2&psi=nan",
          "/image?k=2&psi=1&seed=" + "9" * 1500],
    414: ["/image?k=2&psi=1&seed=" + "9" * 2000, "/" + "x" * 9000]}


@pytest.mark.parametrize("status, path", [(status, path) for status, paths in WRONG.items() for path in paths],
                         ids=lambda value: str(value)[:40])
def test_wrong_requests_are_refused(server, status, path):
    found, headers, content = ask(server, path)
    assert found == status and headers["Content-Type"] == "application/json"
    assert 10 < len(json.loads(content)["error"]) < 160 and ask(server, "/info")[0] == 200


def test_only_get_and_only_from_here(server, capsys):
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"):
        status, headers, content = ask(server, "/info", method, body=b"x=1" if method == "POST" else None)
        assert (status, headers["Allow"]) == (405, "GET") and (content == b"") == (method == "HEAD")
    assert raw(server, b"HEAD /info HTTP/1.1\r\nHost: localhost\r\n\r\n").endswith(b"\r\n\r\n")      # no body
    second = b"GET /log HTTP/1.1\r\nHost: localhost\r\n\r\n"
    smuggled = raw(server, b"POST /info HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n" + second)
    assert smuggled.count(b"HTTP/1.1 ") == 1 and smuggled.startswith(b"HTTP/1.1 405")
    port = server.server_address[1]
    for host, status in (("evil.example", 421), (f"evil.example:{port}", 421), ("127.0.0.1.evil.org", 421), ("", 421),
                         (f"localhost:{port}", 200), ("127.0.0.1", 200), ("[::1]:9", 200), ("192.168.1.7:80", 200),
                         (socket.gethostname(), 200)):
        assert ask(server, "/info", headers={"Host": host})[0] == status, host
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert ask(server, "/info", headers={"Sec-Fetch-Site": site})[0] == status
    assert ask(server, "/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200      # a link that leads here
    for sent in (b"\x16\x03\x01\x00garbage\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        assert b'{"error": ' in raw(server, sent)
    for sent, status in ((b"GET /info HTTP/1.1\r\n\r\n", 421), (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n", 414),
                         (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431)):
        answer = raw(server, sent)
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b'{"error": ' in answer
    raw(server, b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n")
    raw(server, b"GET /info HTT", 0.1)                                # and away
    with socket.create_connection(server.server_address[:2]) as connection:           # asks, and does not wait
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(b"GET /samples?seed=77&psi=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert ask(server, "/info")[0] == 200
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("n", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_wrong_requests_drawn_at_random_leave_nothing_behind(server, capsys, n):
    """Right requests with bytes changed, left out or put in, or with the words of others: answered or closed."""
    random = np.random.RandomState(0)
    words = [f"{route}?{query}" for route in serve.ROUTES for query in ("", POINT, f"{POINT}&to=3&to_seed=1", "i=0")]
    words += [path for paths in WRONG.values() for path in paths if len(path) < 200]
    resource = pytest.importorskip("resource")
    for k in range(n):
        if k == n // 10:                                              # by now all that is kept is there
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        request = bytearray(f"GET {words[random.randint(len(words))]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        for _ in range(random.randint(4)):
            at, some = random.randint(len(request)), random.bytes(random.randint(1, 4))
            request[at:at + random.randint(4)] = some
        answer = raw(server, bytes(request) + b"Connection: close\r\n\r\n", 0.05 if n < 1000 else 1)
        assert not answer or answer.startswith(b"HTTP/1.") or b'{"error": ' in answer, (request, answer[:200])
        assert b"serve.py failed" not in answer, request
    assert capsys.readouterr() == ("", "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000        # KB
    assert ask(server, "/info")[0] == 200 and threading.active_count() < 300


def test_the_page_loads_nothing_from_elsewhere(server):
    status, headers, content = ask(server, "/")
    page = content.decode()
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert page == (HERE / "page.html").read_text("utf-8")
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", page)) == {"http://www.w3.org"}      # SVG's name, no address
    assert not re.search(r"\son\w+=|style=|@import|url\(|eval\(|innerHTML", page)
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["Content-Security-Policy"]
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    ids = re.findall(r'\sid="([\w-]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'\$\("([\w-]+)"\)', page)) <= set(ids)
    assert set(re.findall(r'[`"](/[\w.]+)[?`"]', page)) == set(serve.ROUTES) - {"/"}
    for field in re.findall(r'(?:for|aria-controls|aria-labelledby)="([\w-]+)"', page):
        assert field in ids
    assert set(re.findall(r"info\.(\w+)", page)) <= ask_json(server, "/info").keys()
    assert 'on("save", "click", aim);' in page                        # in the middle of a walk, too
    assert '"hashchange"' in page                                     # an address pasted over another is opened
    for name in ("diversity_fake", "diversity_real", "spread_fake", "spread_real"):       # the old names too
        assert f'"{name}"' in page


node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")


def script():
    return re.search("<script>(.*?)</script>", (HERE / "page.html").read_text("utf-8"), re.S)[1]


@node
def test_the_script_of_the_page_parses(tmp_path):
    (tmp_path / "page.js").write_text(script(), "utf-8")
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


@node
def test_the_axes_of_the_curves_have_ticks_at_whole_steps():
    ticks = re.search(r"^function ticks.*?^}$", script(), re.M | re.S)[0]
    ranges = [[50, 51, 6, 1], [1, 3, 6, 1], [0, 3000, 6, 1], [-0.05, 0.21, 5]]       # the first row of a log
    out = subprocess.run(["node", "-e", f"{ticks} console.log(JSON.stringify({ranges}.map(r => ticks(...r))))"],
                         stdout=subprocess.PIPE, check=True, text=True).stdout
    steps, few, many, values = json.loads(out)
    assert (steps, few, many) == ([50, 51], [1, 2, 3], [0, 500, 1000, 1500, 2000, 2500, 3000])
    assert values == pytest.approx([0, 0.1, 0.2])


def test_two_browsers_and_quick_clicks(server):
    expected, found = {}, []
    for seed in range(100, 110):
        expected[seed] = shown(server, f"/samples?seed={seed}&psi=1").tobytes()
    server.app.block.cache_clear()

    def click(browser):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)       # kept alive
        for k in range(25):
            seed = 100 + (k * 7 + browser) % 10
            connection.request("GET", f"/samples?seed={seed}&psi=1")
            content = connection.getresponse().read()
            found.append(np.asarray(Image.open(io.BytesIO(content))).tobytes() == expected[seed])
        connection.close()

    threads = [threading.Thread(target=click, args=(browser,)) for browser in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 100


def test_animations_are_made_one_at_a_time(server, monkeypatch):
    """Each holds all of its frames: many clicks do not take more memory."""
    now, most, animate, answers = [], [], plots.save_animation, []

    def spy(*args, **more):
        now.append(1)
        most.append(len(now))
        animate(*args, **more)
        now.pop()

    monkeypatch.setattr(plots, "save_animation", spy)
    path = "/walk.gif?seed=2&k=%d&psi=1&to_seed=3&to=6"
    threads = [threading.Thread(target=lambda k=k: answers.append(ask(server, path % k)[0])) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8 and most == [1] * 8


def test_an_exception_in_one_request_leaves_the_server_running(server, monkeypatch, capsys):
    def broken(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(generate, "draw", broken)
    status, _, content = ask(server, "/image?seed=987654&k=2&psi=1")
    assert status == 500 and json.loads(content)["error"].endswith("no more")
    assert "MemoryError" in capsys.readouterr().err
    monkeypatch.undo()
    assert ask(server, "/image?seed=987654&k=2&psi=1")[0] == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_ends_cleanly(trained, number):
    process = subprocess.Popen([sys.executable, HERE / "serve.py", "runs/a", "--port", "0", "--device", "cpu"],
                               cwd=trained, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    waiting = []
    try:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/info")
        assert json.loads(connection.getresponse().read())["name"] == "a"      # and the connection stays open
        for k in range(20):                                  # and others wait for images
            other = socket.create_connection(("127.0.0.1", port))
            other.sendall(b"GET /walk?seed=%d&k=1&psi=1&to_seed=0&to=2 HTTP/1.1\r\nHost: localhost\r\n\r\n" % k)
            waiting.append(other)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        for other in waiting:
            other.close()
    assert (process.returncode, err) == (0, "") and "ended" in out


@pytest.mark.parametrize("flags, answer", [
    (["--port", "99999"], "--port"),
    (["--port", "0", "--host", "no.such.host.invalid"], "cannot listen"),
    (["--port", "0", "--host", "a..b"], "cannot listen"),
    (["--device", "tpu"], "got 'tpu'"),
    (["runs/b", "runs/c"], "unrecognized"),
])
def test_user_errors(at_runs, capsys, flags, answer):
    assert answer in mistake(capsys, lambda: serve.main(["runs/a", "--device", "cpu", *flags]))


def test_a_port_in_use_and_no_run_at_all(server, at_runs, tmp_path, capsys, monkeypatch):
    port = str(server.server_address[1])
    monkeypatch.setattr(serve.Server, "allow_reuse_address", False)
    text = mistake(capsys, lambda: serve.main(["runs/a", "--port", port, "--device", "cpu"]))
    assert f"--port {port}" in text and "--port 0 takes any free port" in text
    monkeypatch.chdir(tmp_path)
    assert "there is no run" in mistake(capsys, lambda: serve.main(["--device", "cpu"]))
