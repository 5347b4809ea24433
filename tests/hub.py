"""A small hub on loopback: what the Hugging Face hub's HTTP interface says to huggingface_hub, for a few made-up repositories.

`Hub` serves repositories at pinned commits with ETags, redirects, ranges and the hub's error codes, and can be told to misbehave:

    with Hub() as hub:
        hub.add(Repo("owner/name", files={"config.json": b"{}"}))
        hub.misbehave("config.json", Fault(status=429, headers={"Retry-After": "1"}), times=1)

`Machine` is a user's machine on which huggingface_hub was told HF_ENDPOINT when it was imported: each command runs in a forked process of its own.
Only 127.0.0.1 is ever contacted. Not simulated: Xet, which takes over when a hub offers it, and the content network on another host.
"""
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_made_up"
LARGE = (".safetensors", ".parquet", ".bin")  # What the hub keeps in large-file storage


@dataclass
class Repo:
    """A repository at one commit."""
    name: str
    files: dict  # Path -> bytes
    kind: str = "model"
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    gated: bool = False

    def etag(self, path):
        """SHA-256 of a large file, git's SHA-1 of another."""
        body = self.files[path]
        return hashlib.sha256(body).hexdigest() if path.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass
class Fault:
    """How a request is answered instead: with a status, with the body cut off or changed, or not for a while."""
    status: int = 0
    headers: dict = field(default_factory=dict)
    cut: float = 0  # Share of the body after which the connection breaks
    flip: bool = False  # Whether a bit of the body is another
    silent: float = 0  # Seconds without an answer


class Hub:
    """The server, and what it was asked."""

    def __init__(self):
        self.repos, self.faults, self.asked = {}, [], []
        self.listen(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def listen(self, place, tries=20):
        """Another process may hold the port of a hub that was gone, but for a moment only."""
        try:
            self.server = ThreadingHTTPServer(place, type("HubHandler", (Handler,), {"hub": self}))
        except OSError:
            if not tries:
                raise
            time.sleep(0.1)
            return self.listen(place, tries - 1)
        self.server.daemon_threads = True

    @contextmanager
    def gone(self):
        """Nobody listens at its address meanwhile."""
        place = self.server.server_address
        self.__exit__()
        try:
            yield
        finally:
            self.listen(place)
            self.__enter__()

    def add(self, repo):
        self.repos[repo.kind, repo.name] = repo
        return repo

    def misbehave(self, part, fault, times=1, method="GET"):
        """Answer the next requests whose path holds `part` otherwise."""
        self.faults.append([part, method, fault, times])

    def fault_for(self, method, path):
        for one in self.faults:
            if one[0] in path and one[1] == method and one[3] > 0:
                one[3] -= 1
                return one[2]


class Handler(BaseHTTPRequestHandler):
    """One request."""
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        self.fault = self.hub.fault_for(self.command, path) or Fault()
        time.sleep(self.fault.silent)
        if self.fault.status:
            return self.send(self.fault.status, b"", self.fault.headers)
        parts = path.strip("/").split("/")
        if parts[0] == "cdn" or parts[:2] == ["api", "resolve-cache"]:
            return self.content(*parts[1 + (parts[0] == "api"):4 + (parts[0] == "api")], "/".join(parts[4 + (parts[0] == "api"):]))
        if parts[0] == "api":
            kind = {"models": "model", "datasets": "dataset"}.get(parts[1])
            return self.about(kind, "/".join(parts[2:4]), parts[4:])
        kind, parts = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.send(404, b"", {})

    do_HEAD = do_GET = answer

    # ---- what is refused ----
    def refuse(self, status, code, message, **headers):
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message} | headers)

    def found(self, kind, name, revision, files):
        """The repository, unless the request is refused; information on a gated one is public, its files are not."""
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if revision not in (repo.commit, "main", None):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repo.gated and files and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "GatedRepo", f"Access to {kind} {name} is restricted.")
        return repo

    def about(self, kind, name, rest):
        repo = self.found(kind, name, rest[1] if len(rest) > 1 else None, files=False)
        if repo is None:
            return
        if rest and rest[0] != "revision":
            return self.send(404, b"", {})
        said = {"_id": "0", "id": name, "sha": repo.commit, "private": False, "gated": "manual" if repo.gated else False, "disabled": False,
                "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(repo.files)]}
        self.send(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    # ---- files ----
    def resolve(self, kind, name, revision, path):
        """A file leads to another path: a small one to a cache of the hub, a large one to the content network."""
        repo = self.found(kind, name, revision, files=True)
        if repo is None:
            return
        commit = {"X-Repo-Commit": repo.commit}
        if path not in repo.files:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist", **commit)
        tag, size = f'"{repo.etag(path)}"', str(len(repo.files[path]))
        if path.endswith(LARGE):
            linked = {"X-Linked-Etag": tag, "X-Linked-Size": size, "Location": f"{self.hub.url}/cdn/{kind}/{name}/{path}"}
            return self.send(302, b"", commit | linked)
        self.send(307, b"", commit | {"ETag": tag, "Location": f"/api/resolve-cache/{kind}/{name}/{path}"})

    def content(self, kind, owner, name, path):
        repo = self.hub.repos[kind, f"{owner}/{name}"]
        body, headers, status = repo.files[path], {"ETag": f'"{repo.etag(path)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}, 200
        if self.fault.flip:
            body = body[:len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1:]
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(body)), len(body) - 1)
            headers["Content-Range"], status = f"bytes {first}-{last}/{len(body)}", 206
            body = body[first:last + 1]
        self.send(status, body, headers)

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:int(len(body) * (self.fault.cut or 1))])
            self.close_connection |= self.fault.cut > 0


# ---- made-up repositories with the published file names and columns ----
CARD = b"---\nlicense: mit\n---\n"


def parquet_bytes(rows):
    """Rows as one parquet file."""
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def gsm8k_rows(split, count=16):
    start = 0 if split == "train" else 500
    return [{"question": f"Ann has {i} pens and buys {i % 7 + 1} more{' today' * (i % 5)}. How many?", "answer": f"{i}+{i % 7 + 1}=<<{i}+{i % 7 + 1}={i + i % 7 + 1}>>\n#### {i + i % 7 + 1}"}
            for i in range(start, start + count)]


def strategyqa_rows(split, count=16):
    return [{"qid": f"{split}{i}", "term": "ice", "description": "cold water", "question": f"Is ice number {i} of {split} cold{' now' * (i % 5)}?", "answer": i % 2 == 0,
             "facts": f"Ice {i} is frozen water. Frozen water is cold.", "decomposition": ["What is ice?"]} for i in range(count)]


def arc_rows(split, count=16):
    labels = [list("ABCD"), list("1234"), list("ABCDE"), list("ABC")]
    return [{"id": f"{split}{i}", "question": f"Which of these shines in case {i} of {split}{' then' * (i % 5)}?",
             "choices": {"text": ["a sun", "a stone", "a leaf", "a fish", "a cup"][:len(labels[i % 4])], "label": labels[i % 4]}, "answerKey": labels[i % 4][i % 3]} for i in range(count)]


def wikitext_rows(split):
    lines = ["", f" = A page of {split} = \n", ""] + [f" The river of {split} runs {i} miles to the sea and turns once . \n" for i in range(40)]
    return [{"text": line} for line in lines]


def data_sets(strategyqa_in="parquet"):
    """The data sets that the code names, at the commits that it pins."""
    from cap_nb.data.problems import TASKS, WIKITEXT

    GSM8K, STRATEGYQA, ARC = (TASKS[name] for name in ("gsm8k", "strategyqa", "arc"))

    def both(folder, rows, splits=("train", "test")):
        return {f"{folder}/{split}-00000-of-00001.parquet": parquet_bytes(rows(split)) for split in splits}

    if strategyqa_in == "parquet":
        strategyqa = both("data", strategyqa_rows)
    else:
        strategyqa = {f"{split}.json": json.dumps(strategyqa_rows(split)).encode() for split in ("train", "test")}
    halves = [parquet_bytes(gsm8k_rows("train")[:8]), parquet_bytes(gsm8k_rows("train")[8:])]  # Two files, as large splits have
    gsm8k = {f"main/train-0000{i}-of-00002.parquet": half for i, half in enumerate(halves)} | {"main/test-00000-of-00001.parquet": parquet_bytes(gsm8k_rows("test"))}
    files = {GSM8K.hub: {"README.md": CARD} | gsm8k | both("socratic", gsm8k_rows),
             STRATEGYQA.hub: {"README.md": CARD} | strategyqa,
             ARC.hub: {"README.md": CARD} | both("ARC-Challenge", arc_rows) | both("ARC-Easy", arc_rows),
             WIKITEXT: {"README.md": CARD} | both("wikitext-2-raw-v1", wikitext_rows, ("test", "validation")) | both("wikitext-103-raw-v1", wikitext_rows, ("test",))}
    return [Repo(name, kind="dataset", commit=commit, files={".gitattributes": b""} | content) for (name, _, commit), content in files.items()]


def byte_tokenizer(ends=("<s>", "</s>"), merges=()):
    """A tokenizer whose tokens are bytes, pairs that are merged, and `ends`, of which the last one ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*ends, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(zip(("eos_token", "bos_token"), reversed(ends)), pad_token=ends[-1])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_llama(folder, shard="1GB", template=None, **settings):
    """Save a tiny Llama, and a tokenizer of bytes, as transformers does."""
    from fixtures import tiny_llama

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    tiny_llama(vocab_size=len(tokenizer), **ends, **settings).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)


def llama_files(folder, shard="1GB"):
    """The files of a tiny Llama as transformers saves it, with what else a repository holds."""
    save_llama(folder, shard, max_position_embeddings=2048, num_hidden_layers=2)
    beside = {"README.md": b"---\nlicense: apache-2.0\n---\nA tiny Llama.\n", "pytorch_model.bin": b"a pickle that nobody wants", "modeling.py": b"raise SystemExit('ran')\n",
              "LICENSE": b"Keep this beside the weights.\n", ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())} | beside


# ---- a user's machine ----
WORKER = """
import json, os, sys, time
import cap_nb.command_line, cap_nb.single_steps, cap_nb.experiments.claims, cap_nb.jobs.sweeps, huggingface_hub.constants as constants
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(job["environment"])
        constants.HF_HUB_CACHE = job["cache"]
        os.chdir(job["folder"])
        for number, name in ((1, "out"), (2, "err")): os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code, waits = 0, []
        time.sleep = waits.append # what would be waited is counted
        try:
            if job["python"]: exec(job["python"], {})
            else:
                sys.argv = ["cap", *job["words"]]
                cap_nb.command_line.app()
        except SystemExit as left: code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush(); sys.stderr.flush()
        with open(job["waited"], "w") as file: file.write(str(sum(waits)))
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"code": status}), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command said."""
    code: int
    out: str
    err: str
    waited: float  # seconds that it wanted to sleep


def environment(url, cache):
    """What a user's shell has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "TQDM_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_ETAG_TIMEOUT": "2", "TQDM_DISABLE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class Machine:
    """Commands in forked processes of one that has imported everything."""

    def __init__(self, url, folder):
        self.folder = Path(folder)
        self.worker = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(url, self.folder / "home"))

    def close(self):
        self.worker.stdin.close()
        self.worker.wait(10)

    def run(self, words="", cache="cache", python=None, **variables):
        job = {"words": str(words).split(), "python": python, "environment": variables, "cache": str(self.folder / cache), "folder": str(self.folder),
               "out": str(self.folder / "out.txt"), "err": str(self.folder / "err.txt"), "waited": str(self.folder / "waited.txt")}
        self.worker.stdin.write(json.dumps(job) + "\n")
        self.worker.stdin.flush()
        said = json.loads(self.worker.stdout.readline())
        return Outcome(code=said["code"], out=Path(job["out"]).read_text(), err=Path(job["err"]).read_text(),
                       waited=float(Path(job["waited"]).read_text()))
