"""A local web page for a trained generator: samples, sliders along principal directions, walks, training curves.

    python serve.py                          the newest run, at http://127.0.0.1:8000/
    python serve.py runs/wgan-teeth-1        this run; or a file in its generators/

The page loads nothing from other sites, and the server writes no file. There is no password. Ctrl-C ends it.
"""

import base64
import contextlib
import functools
import hashlib
import http.server
import inspect
import io
import ipaddress
import json
import math
import os
import re
import signal
import socket
import sys
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import cli
import data
import generate
import plots
import runs
import runtime

DIRECTIONS, REACH = 10, 6.0                                  # sliders of the page, and how far each goes


class HTTPError(Exception):
    """(status, sentence): a request that is refused."""


SEED, NUMBER, OFFSET = cli.number(int, 0, 2**32), cli.number(int, 0, 10**6), cli.number(float, -REACH, REACH + 1e-6)
PARAMETERS = dict(i=NUMBER, seed=SEED, k=NUMBER, psi=cli.number(float, 0, 2.001), to_seed=SEED, to=NUMBER,
                  t=cli.number(float, 0, 1.001), d=lambda text: [OFFSET(word) for word in text.split(",")])
ROUTES = ("/", "/info", "/log", "/history", "/grid", "/samples", "/image", "/walk", "/walk.gif")    # to App.get_...


class App:
    """Answers requests from any thread; one worker does the work. Files are asked for by number, never by a path."""

    def __init__(self, trained):
        self.trained, self.G, self.latent = trained, trained.G, trained.G.config["latent"]
        self.page = (Path(__file__).parent / "page.html").read_text("utf-8")
        self.directions, self.shares = (x[:DIRECTIONS].cpu() for x in generate.principal_directions(trained.G))
        self.size = tuple(trained.G.config["size"])
        self.n = generate.BLOCK * (2 if max(self.size) <= 128 else 1)                         # samples on the page
        self.frames = min(48, max(12, 2**21 // math.prod(self.size)))                         # of a walk
        self.worker = ThreadPoolExecutor(1)                  # torch keeps a pool of threads for each one that uses it
        self.block = functools.lru_cache(max(4, 2**26 // (generate.BLOCK * 3 * math.prod(self.size))))(self._block)

    def answer(self, path, query):
        """(content type, bytes) of a request, its parameters those of the get_ function. Raises `HTTPError`."""
        if path not in ROUTES:
            raise HTTPError(404, "there is no such page")
        get = getattr(self, "get_" + (path[1:].replace(".", "_") or "page"))
        try:
            texts = urllib.parse.parse_qs(query, True, bool(query), max_num_fields=16, errors="strict")
            inspect.signature(get).bind(**texts)
            arguments = {name: PARAMETERS[name](*given) for name, given in texts.items()}         # each is given once
        except (ValueError, TypeError) as error:
            raise HTTPError(400, f"wrong parameters: {runtime.first_line(error)}") from None
        if "seed" not in arguments:                          # needs no network
            return encode(get(**arguments))
        return encode(self.worker.submit(get, **arguments).result())

    def _block(self, seed, b, psi):
        numbers = range(b * generate.BLOCK, (b + 1) * generate.BLOCK)
        return generate.draw(self.G, generate.latents(seed, numbers, self.latent, psi))

    def images(self, seed, k, psi, d=(), to_seed=None, to=None, t=None):
        """Of a sample moved by d along the principal directions, then by t (n, 1) towards another: (n, C, H, W)."""
        if len(d) > len(self.directions):
            raise HTTPError(400, f"d: expected at most {len(self.directions)} numbers, got {len(d)}")
        z = generate.latents(seed, [k], self.latent, psi)
        z = z + torch.tensor(d) @ self.directions[:len(d)] if any(d) else z
        z = z if t is None else generate.slerp(z, generate.latents(to_seed, [to], self.latent, psi), t)
        return generate.draw(self.G, z)

    def get_page(self):
        return "text/html; charset=utf-8", self.page.encode()

    def get_info(self):
        flags, folder = self.trained.saved.get("flags"), self.trained.folder
        return dict(name=(folder or self.trained.path.with_suffix("")).resolve().name, step=self.trained.step,
                    data=Path(flags["data"]).resolve().name if flags else "",
                    height=self.size[0], width=self.size[1], n=self.n, length=self.latent,
                    shares=self.shares.tolist(), reach=REACH, frames=self.frames, run=folder is not None)

    def get_samples(self, seed, psi):
        return tile(torch.cat([self.block(seed, b, psi) for b in range(self.n // generate.BLOCK)]), 256)

    def get_image(self, seed, k, psi, d=(), to_seed=None, to=None, t=None):
        if (to is None) != (to_seed is None) or (to is None and t is not None):
            raise HTTPError(400, "the end of a walk is given by to_seed and to")
        if not any(d) and not t:                             # the same bits as in the grid and from generate.py --out
            return plots.to_pil(self.block(seed, k // generate.BLOCK, psi)[k % generate.BLOCK])
        return plots.to_pil(self.images(seed, k, psi, d, to_seed, to, t)[0])

    def get_walk(self, seed, k, psi, to_seed, to, d=()):
        t = torch.linspace(0, 1, self.frames, dtype=torch.float64)[:, None]
        return tile(self.images(seed, k, psi, d, to_seed, to, t), 512)

    def get_walk_gif(self, seed, k, psi, to_seed, to, d=()):
        angles = torch.linspace(0, 2 * math.pi, self.frames + 1, dtype=torch.float64)[:-1, None]
        images, file = self.images(seed, k, psi, d, to_seed, to, (1 - angles.cos()) / 2), io.BytesIO()    # and back
        plots.save_animation(file, images, milliseconds=2400 // self.frames)
        return "image/gif", file.getvalue()

    def get_log(self):
        rows = [{name: v for name, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
                for row in (runs.read_log(self.trained.folder) if self.trained.folder else [])]
        # About 1,500 points a curve, the last among them; FID and the like are in few rows, which must not be lost.
        columns = ([k for k, row in enumerate(rows) if name in row] for name in set().union(*rows))
        kept = {k for column in columns for k in column[::-1][::-(-len(column) // 1500)]}
        return [rows[k] for k in sorted(kept)]

    def grids(self):
        return plots.saved_grids(self.trained.folder / "samples") if self.trained.folder else []

    def get_history(self):
        return [int(path.stem[5:]) for path in self.grids()]

    def get_grid(self, i):
        grids = self.grids()
        if i >= len(grids):
            raise HTTPError(404, f"there are {len(grids)} sample grids, counted from 0")
        return "image/png", grids[i].read_bytes()


def encode(value):
    """A PIL image -> PNG, a dict or list -> JSON: (content type, bytes); such a tuple stays as it is."""
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG", compress_level=1)
        return "image/png", file.getvalue()
    return value if isinstance(value, tuple) else ("application/json", json.dumps(value, allow_nan=False).encode())


def tile(images, side):
    """uint8 (n, C, H, W) as one PIL image, eight in a row, no pixel between; images over `side` pixels are reduced."""
    k = -(-max(images.shape[2:]) // side)                    # the mean of k x k pixels
    return plots.grid(data.to_float(torch.nn.functional.avg_pool2d(images.float(), k, ceil_mode=True)), pad=0)


def is_trusted(host, bound):
    """Whether a Host header is an address, localhost, this machine's name or `bound`, at any port: no DNS rebinding."""
    name = re.sub(r":\d*$", "", host.strip().lower()) if host.count(":") < 2 or "]" in host else host
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.strip("[]")))
    return name in ("localhost", bound.lower(), socket.gethostname().lower())


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET of the paths in ROUTES and refuses everything else with a sentence."""
    protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "serve.py", "", 60
    disable_nagle_algorithm = True

    def do_GET(self):
        try:
            if len(self.path) > 2000:
                raise HTTPError(414, "this address is too long")
            if not is_trusted(self.headers.get("Host", ""), self.server.bound):
                raise HTTPError(421, "this name is not served here: use http://localhost or the machine's IP address")
            path, _, query = self.path.partition("?")
            if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and path != "/":
                raise HTTPError(403, "pages of other sites may not request this")
            status, answer = 200, self.server.app.answer(path, query)
        except HTTPError as error:
            status, answer = error.args
        except Exception as error:                           # whatever it was, the next request is answered
            print(f"serve.py: {self.path[:200]}: {type(error).__name__}: {error}", file=sys.stderr)
            status, answer = 500, f"serve.py failed: {runtime.first_line(error)}"
        self.reply(status, answer)

    def reply(self, status, answer):
        kind, content = encode({"error": answer} if isinstance(answer, str) else answer)           # refused, or not
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Allow": "GET",
                            "Cross-Origin-Resource-Policy": "same-origin",
                            "Content-Security-Policy": self.server.policy}.items():
            self.send_header(name, value)
        if status != 200:                                    # else a body that was sent would be read as a request
            self.send_header("Connection", "close")          # this closes the connection, too
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):  # what the standard library refuses by itself
        if code == 501:                                      # there is no do_POST and the like
            code, message = 405, "only GET is answered here"
        self.reply(code, message or "this request cannot be read")

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection, one `App` for all of them."""
    daemon_threads, request_queue_size, allow_reuse_address = True, 128, sys.platform != "win32"

    def __init__(self, app, host="127.0.0.1", port=0):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.app, self.bound = app, host
        hashes = [f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                  for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", self.app.page, re.S)]
        self.policy = "; ".join(["default-src 'none'", "img-src 'self' data:", "connect-src 'self'", "base-uri 'none'",
                                 "form-action 'none'", "frame-ancestors 'none'", *hashes])
        super().__init__((host, port), Handler)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):       # the browser has gone
            super().handle_error(request, client_address)


def parse_arguments(argv=None):
    parser = cli.Parser("serve.py", __doc__)
    add = parser.add_argument
    add("run", nargs="?", default="", metavar="RUN", help="run folder or generator file (default: the newest run)")
    add("--port", type=cli.number(int, 0, 65536), default=8000, help="port; 0 is any free one (default: 8000)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, for this machine alone)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    return parser.parse_args(argv)


@runtime.exit_on_user_error("serve.py")
def main(argv=None):
    args = parse_arguments(argv)
    app = App(generate.open_generator(args.run, runtime.pick_device(args.device)))
    try:
        server = Server(app, args.host, args.port)
    except (OSError, UnicodeError) as error:
        raise runtime.UserError(f"cannot listen at --host {args.host} --port {args.port} ({error}): --host expects an "
                                "address or a name of this machine, and --port 0 takes any free port") from error
    host = f"[{args.host}]" if ":" in args.host else args.host
    runtime.print_rank0(f"{app.trained.label} at http://{host}:{server.server_address[1]}/ (Ctrl-C ends)"
                        + "; other machines can reach it" * (host not in ("127.0.0.1", "[::1]", "localhost")))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        runtime.print_rank0("\nended")
        os._exit(0)                                          # threads of open connections may be anywhere just now


if __name__ == "__main__":
    main()
