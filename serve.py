"""A local web page on a trained generator."""

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import ipaddress
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import cli
import generate
import plots
import runs
import runtime

DIRECTIONS, REACH = 10, 6.0                                  # sliders of the web page, and how far each goes


class HTTPError(Exception):
    """A request that is answered by a status of 4xx and a sentence."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


def offsets(text):
    """"0.5,-1" -> how far to go along each principal direction."""
    words = text.split(",") if text else []
    if len(words) > DIRECTIONS:
        raise ValueError
    return [cli.number(float, -REACH, REACH + 1e-6)(word) for word in words]


offsets.__name__ = f"list of at most {DIRECTIONS} numbers from {-REACH:g} to {REACH:g}"
SEED, NUMBER = cli.number(int, 0, 2**32), cli.number(int, 0, 10**6)
PSI, T = cli.number(float, 0, 2.001), cli.number(float, 0, 1.001)
POINT = {"seed": SEED, "k": NUMBER, "psi": PSI}              # which sample
END, MOVE = {"to_seed": SEED, "to": NUMBER}, {"d": offsets}  # ... and where from there
ROUTES = {                                                   # path: (parameters it needs, those it may have)
    "/": ({}, {}), "/info": ({}, {}), "/log": ({}, {}), "/history": ({}, {}), "/sheet": ({"i": NUMBER}, {}),
    "/samples": ({"seed": SEED, "psi": PSI}, {}), "/picture": (POINT, {**MOVE, **END, "t": T}),
    "/walk": ({**POINT, **END}, MOVE), "/walk.gif": ({**POINT, **END}, MOVE)}


class Gallery:
    """What the page asks for. `answer` may be called by any thread: one thread alone works the network.

    Nothing of a request ever becomes a part of a path: pictures of the run are asked for by their place in a listing.
    """

    def __init__(self, source):
        self.source, self.G, config = source, generate.fuse_batchnorm(source.G), source.G.config
        self.size, self.length = tuple(config["size"]), config["latent"]
        self.directions, shares = generate.principal_directions(source.G)
        self.directions, self.shares = self.directions[:DIRECTIONS].cpu(), shares[:DIRECTIONS].tolist()
        side, pixels = max(self.size), math.prod(self.size)
        self.n = 2 * generate.BLOCK if side <= 128 else generate.BLOCK             # samples on the page
        self.shrink = -(-side // 256)                                                 # for the grid alone
        self.frames = min(48, max(12, 2**21 // pixels))                               # of a walk
        self.worker = ThreadPoolExecutor(1)                  # one at a time; and torch's threads belong to one caller
        self.room = threading.Semaphore(256)                 # for so many that wait
        self.block = functools.lru_cache(max(4, 2**26 // (generate.BLOCK * 3 * pixels)))(self._block)

    def answer(self, path, given):
        """(content type, bytes). Raises `Mistake`."""
        if path not in ROUTES:
            raise HTTPError(404, "there is no such page")
        return getattr(self, "get_" + (path[1:].replace(".", "_") or "page"))(**arguments(path, given))

    def run(self, function, *args, **more):
        """function(*args, **more) by the one thread that works the network; 503 when too many wait for it already."""
        if not self.room.acquire(blocking=False):
            raise HTTPError(503, "too many requests at a time: try again")
        try:
            return self.worker.submit(function, *args, **more).result()
        finally:
            self.room.release()

    # ---- pictures; only the worker calls what begins with an underscore

    def _block(self, seed, b, psi):
        numbers = range(b * generate.BLOCK, (b + 1) * generate.BLOCK)
        return generate.draw(self.G, generate.latents(seed, numbers, self.length, psi))

    def _sample(self, seed, k, psi):
        return self.block(seed, k // generate.BLOCK, psi)[k % generate.BLOCK]

    def _start(self, seed, k, psi, d):
        z = generate.latents(seed, [k], self.length, psi)
        if len(d) > len(self.directions):
            raise HTTPError(400, f"d has {len(d)} numbers, and there are {len(self.directions)} directions")
        return z + torch.tensor(d) @ self.directions[:len(d)] if any(d) else z

    def _picture(self, seed, k, psi, d=(), to_seed=None, to=None, t=0.0):
        if not any(d) and (t == 0 or to is None):
            return self._sample(seed, k, psi)                # the very picture of the sheet, and of --out
        z = self._start(seed, k, psi, d)
        if to is not None:
            z = generate.slerp(z, generate.latents(to_seed, [to], self.length, psi), t)
        return generate.draw(self.G, z)[0]

    def _walk(self, t, seed, k, psi, to_seed, to, d=()):
        end = generate.latents(to_seed, [to], self.length, psi)
        return generate.draw(self.G, generate.slerp(self._start(seed, k, psi, d), end, t))

    def _animation(self, t, **point):
        file = io.BytesIO()
        plots.save_animation(file, self._walk(t, **point), milliseconds=2400 // self.frames)
        return file.getvalue()

    # ---- answers

    def get_page(self):
        return "text/html; charset=utf-8", PAGE.encode()

    def get_info(self):
        flags = self.source.flags
        source = Path(flags.data).resolve().name if flags and flags.data != "demo" else "demo" if flags else ""
        height, width = self.size
        name = (self.source.folder or self.source.path.with_suffix("")).resolve().name
        return as_json(dict(name=name, step=self.source.step, data=source, height=height, width=width, n=self.n,
                            length=self.length, shares=self.shares, reach=REACH, frames=self.frames,
                            run=self.source.folder is not None))

    def get_samples(self, seed, psi):
        pixels = torch.cat([self.run(self.block, seed, b, psi) for b in range(self.n // generate.BLOCK)])
        ims = [plots.to_pil(x).reduce(self.shrink) for x in pixels]
        return as_png(tiled(ims, 8))

    def get_picture(self, **point):
        if point.keys() & {*END, "t"} and not END.keys() <= point.keys():
            raise HTTPError(400, "the end of a walk is named by to_seed and to")
        return as_png(plots.to_pil(self.run(self._picture, **point)))

    def get_walk(self, **point):
        t = torch.linspace(0, 1, self.frames, dtype=torch.float64)[:, None]
        pixels = self.run(self._walk, t, **point)
        return as_png(tiled([plots.to_pil(x).reduce(-(-max(self.size) // 512)) for x in pixels], 8))

    def get_walk_gif(self, **point):
        angles = torch.linspace(0, 2 * math.pi, self.frames + 1, dtype=torch.float64)[:-1, None]
        t = (1 - angles.cos()) / 2                                                    # there and back
        return "image/gif", self.run(self._animation, t, **point)

    def get_log(self):
        rows = [{name: v for name, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
                for row in (runs.read_log(self.source.folder) if self.source.folder else [])]
        rows = [row for row in rows if "step" in row]
        # Some 1,500 points a curve, its last among them; FID and its like stand in few rows, which must not be lost.
        columns = ([k for k, row in enumerate(rows) if name in row] for name in set().union(*rows))
        kept = {k for column in columns for k in column[::-1][::-(-len(column) // 1500)]}
        return as_json([rows[k] for k in sorted(kept)])

    def _sheets(self):
        paths = (self.source.folder / "samples").glob("step-*.png") if self.source.folder else ()
        return sorted(path for path in paths if path.stem[5:].isdigit())

    def get_history(self):
        return as_json([int(path.stem[5:]) for path in self._sheets()])

    def get_sheet(self, i):
        sheets = self._sheets()
        if i >= len(sheets):
            raise HTTPError(404, f"there are {len(sheets)} sheets of samples, counted from 0")
        return "image/png", sheets[i].read_bytes()


def arguments(path, given):
    """The query string of a request -> checked arguments. Raises `Mistake` for anything missing, unknown or wrong."""
    needed, allowed = ROUTES[path]
    kinds, found = {**needed, **allowed}, {}
    try:
        pairs = urllib.parse.parse_qsl(given, keep_blank_values=True, strict_parsing=bool(given), max_num_fields=16,
                                       errors="strict")
    except ValueError:
        raise HTTPError(400, "the part after the question mark cannot be read") from None
    for name, text in pairs:
        if name not in kinds or name in found:
            raise HTTPError(400, f"{name[:40]!r} is not wanted here" if name not in kinds else f"{name} is given twice")
        try:
            found[name] = kinds[name](text)
        except ValueError:
            raise HTTPError(400, f"{name} has to be a {kinds[name].__name__}") from None
    for name in needed:
        if name not in found:
            raise HTTPError(400, f"{name} is missing")
    return found


def as_json(value):
    return "application/json", json.dumps(value, allow_nan=False).encode()


def as_png(im):
    file = io.BytesIO()
    im.save(file, "PNG", compress_level=1)
    return "image/png", file.getvalue()


def tiled(ims, columns):
    """PIL pictures of one size side by side, row by row, no pixel between them."""
    width, height = ims[0].size
    sheet = Image.new(ims[0].mode, (width * min(columns, len(ims)), height * -(-len(ims) // columns)))
    for k, im in enumerate(ims):
        sheet.paste(im, (k % columns * width, k // columns * height))
    return sheet


def trusted(host, bound):
    """Whether a Host header names this machine by an address, as localhost, by its own name or by `bound`.

    A page elsewhere may let its own name lead to 127.0.0.1 and so read what is served here (DNS rebinding); such a
    name it cannot do without. The port may be another one, that of a tunnel.
    """
    name = re.sub(r":\d*$", "", host.strip().lower()) if host.count(":") < 2 or "]" in host else host
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.strip("[]")))
    return name in ("localhost", bound.lower(), socket.gethostname().lower())


class Handler(http.server.BaseHTTPRequestHandler):
    """GET of what is in ROUTES; everything else is refused by a sentence."""
    protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "generate.py", "", 60
    disable_nagle_algorithm = True

    def __getattr__(self, name):
        if name.startswith("do_"):                           # every method but GET
            return lambda: self.refuse(405, "only GET is answered here")
        raise AttributeError(name)

    def do_GET(self):
        try:
            if len(self.path) > 2000:
                raise HTTPError(414, "this address is too long")
            if not trusted(self.headers.get("Host", ""), self.server.bound):
                raise HTTPError(421, "this name is not served here: use http://localhost or the machine's IP address")
            path, _, given = self.path.partition("?")
            if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and path != "/":
                raise HTTPError(403, "another site's page may not ask for this")
            kind, content = self.server.gallery.answer(path, given)
        except HTTPError as mistake:
            return self.refuse(mistake.status, str(mistake))
        except Exception as error:                           # whatever it was, the next request is answered
            if self.server.closed:
                return self.refuse(503, "generate.py has been ended")
            print(f"generate.py: {self.path[:200]}: {type(error).__name__}: {error}", file=sys.stderr)
            return self.refuse(500, f"this went wrong here: {runtime.first_line(error)}")
        self.reply(200, kind, content)

    def reply(self, status, kind, content):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                            "Cross-Origin-Resource-Policy": "same-origin",
                            "Content-Security-Policy": self.server.policy}.items():
            self.send_header(name, value)
        if status == 405:
            self.send_header("Allow", "GET")
        if status != 200:                                    # a body that came along would be read as a request
            self.send_header("Connection", "close")          # closes it, too
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, sentence):
        kind, content = as_json({"error": sentence})
        self.reply(status, kind, content)

    def send_error(self, code, message=None, explain=None):  # what the standard library refuses by itself
        self.refuse(code, message or "this request cannot be read")

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):     # the browser has gone
            super().handle()

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection; all ask the one gallery."""
    daemon_threads, request_queue_size, allow_reuse_address = True, 128, sys.platform != "win32"

    def __init__(self, source, host="127.0.0.1", port=0):
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.bound = host
        hashes = [f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                  for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", PAGE, re.S)]
        self.policy = "; ".join(["default-src 'none'", "img-src 'self' data:", "connect-src 'self'", "base-uri 'none'",
                                 "form-action 'none'", "frame-ancestors 'none'", *hashes])
        super().__init__((host, port), Handler)
        self.gallery, self.closed = Gallery(source), False

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self):
        super().server_close()
        if hasattr(self, "gallery"):                         # not when there was no room at the address
            self.closed = True
            self.gallery.worker.shutdown(wait=True, cancel_futures=True)


def serve(source, host, port):
    try:
        server = Server(source, host, port)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--serve cannot listen at {host}, port {port}: {runtime.first_line(error)}; --serve 0 takes "
                         f"any free port") from error
    where = f"[{host}]" if ":" in host else host
    runtime.print_rank0(f"{generate.describe_source(source)} at http://{where}:{server.server_address[1]}/ (Ctrl-C ends)"
                + ("" if host in ("127.0.0.1", "::1", "localhost") else "; whoever reaches this machine can look"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
        runtime.print_rank0("\nended")
        os._exit(0)                                          # threads of open connections may be anywhere just now


PAGE = (Path(__file__).parent / "page.html").read_text("utf-8")
