"""A server that answers in LMDeploy's format, for tests of what starts, watches and stops it.

``python lmdeploy_stand_in.py MODEL_DIR PORT SCRIPT``: SCRIPT is a JSON file; faults in it are used up one by one:
{"faults": {"/generate": ["die", "hang", "error", "500", "400", "short", "no_stop", "abort", "junk", …], …},
"delay_s": 0.0}. Every request is a line of SCRIPT.log, every start one of SCRIPT.starts. The format is tied to
LMDeploy's source by test_sampling_lmdeploy_contract.py.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

STOP = 2


class StandIn(BaseHTTPRequestHandler):
    lock = threading.Lock()
    asleep: set[str] = set()
    script: dict = {}
    script_path = Path()
    weights = b""

    def do_GET(self):
        self.answer(200, {"status": "healthy"})

    def do_POST(self):
        url = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:  # one that dies leaves whole files, and takes no other request's fault with it
            fault = self.next_fault(url.path)
            self.note(url, body, fault)
            if fault == "die":
                os._exit(9)
        if fault == "hang":
            time.sleep(600)
        if fault in ("500", "400", "503"):
            self.answer(int(fault), {"message": "planted", "code": int(fault)})
        elif url.path == "/sleep":
            StandIn.asleep = {"weights", "kv_cache"}
            self.answer(200, None)
        elif url.path == "/wakeup":
            tags = set(parse_qs(url.query).get("tags", self.asleep))
            if tags <= self.asleep:
                StandIn.asleep = self.asleep - tags
            self.answer(200, None)
        elif url.path == "/update_weights":
            self.answer(200, None)
        elif self.asleep:
            self.answer(503, {"message": "Engine is sleeping"})
        else:
            time.sleep(self.script.get("delay_s", 0.0))
            self.answer(200, self.generated(body, fault))

    def generated(self, body: dict, fault: str | None) -> dict:
        """The answer to a prompt: its last id, then the largest weight file's first byte, then the stop token."""
        ids = [body["input_ids"][-1], 100 + self.weights[0], STOP][: body["max_tokens"]]
        reason = "stop" if ids[-1] == STOP else "length"
        if fault == "short":
            ids, reason = ids[:1], "length"
        elif fault == "no_stop":
            ids = ids[:-1]
        elif fault == "junk":
            return {"surprise": True}
        elif fault in ("error", "abort"):
            ids, reason = [], fault
        meta = {"finish_reason": {"type": reason}, "completion_tokens": len(ids)}
        return {"text": "", "output_ids": ids, "meta_info": meta}

    def next_fault(self, path: str) -> str | None:
        """The next planted fault of an endpoint, once for all starts of the server."""
        script = json.loads(self.script_path.read_text())
        faults = script.get("faults", {}).get(path, [])
        if not faults:
            return None
        fault = faults.pop(0)
        self.script_path.write_text(json.dumps(script))
        return fault

    def note(self, url, body: dict, fault: str | None) -> None:
        line = {"path": url.path, "query": url.query, "body": body, "fault": fault}
        with open(f"{self.script_path}.log", "a") as file:
            file.write(json.dumps(line) + "\n")

    def answer(self, status: int, value) -> None:
        text = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


def main(model_dir: str, port: str, script: str) -> None:
    StandIn.script_path = Path(script)
    StandIn.script = json.loads(StandIn.script_path.read_text())
    print("stand-in starts", flush=True)
    with open(f"{script}.starts", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "model_dir": model_dir}) + "\n")
    if StandIn.script.get("refuses_to_start"):
        sys.exit("planted: no such model")
    StandIn.weights = (Path(model_dir) / "weights.txt").read_bytes()
    ThreadingHTTPServer(("127.0.0.1", int(port)), StandIn).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
