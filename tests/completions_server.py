"""A completions server around a model in this process, with the spellings of several kinds of servers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class CompletionsServer:
    """Answers as a server of one kind does.

    Args:
        model: an `HFLanguageModel`.
        kind: "vllm" (token ids, prompt_logprobs with ranks, token_ids back), "echo" (text alone, echo with logprobs as
            llama-cpp-python has it; settings beyond OpenAI's are refused), "llama" (token ids; no log-probabilities of
            a prompt).
        key: that requests must carry.

    Attributes:
        failures: statuses that the next requests get, first things first.
        asked: (path, body, headers) of every request.
        at_once: most requests that were open at once.
    """

    def __init__(self, model, kind="vllm", key=""):
        self.model, self.kind, self.key = model, kind, key
        self.failures, self.asked, self.at_once, self._open = [], [], 0, 0
        self._lock, self._counting = threading.Lock(), threading.Lock()

    def answer(self, method, path, body, headers):
        """Return (status, object)."""
        self.asked.append((path, body, dict(headers)))
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": f"wrong key {headers.get('Authorization', '')[7:]}"}}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "served", "owned_by": "tests", "max_model_len": 4096}]}
        if self.failures:
            return self.failures.pop(0), {"error": {"message": "busy"}}
        if path != "/v1/completions" or method != "POST":
            return 404, {"error": {"message": "no such path"}}
        takes_ids, strict = self.kind != "echo", self.kind == "echo"
        if strict and set(body) & {"return_token_ids", "repetition_penalty", "prompt_logprobs"}:
            return 400, {"error": {"message": "unknown setting"}}
        if isinstance(body["prompt"], list) and not takes_ids:
            return 422, {"detail": "prompt must be text"}
        with self._lock:  # torch, one at a time
            return 200, self._complete(body)

    def _complete(self, body):
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.model.encode(prompt)
        new = self.model.greedy(ids, body["max_tokens"])
        ends = self.model.ending_tokens
        text = self.model.decode([token for token in new if token not in ends])
        choice = {"index": 0, "text": text, "finish_reason": "stop" if new and new[-1] in ends else "length"}
        if self.kind == "vllm" and body.get("return_token_ids"):
            choice["token_ids"] = new
        if self.kind == "vllm" and body.get("prompt_logprobs"):
            values, best, _ = self._prompt(ids)
            rows = [None]
            for token, value, (top, top_value) in zip(ids[1:], values, best, strict=True):
                row = {str(top): {"logprob": top_value, "rank": 1}}
                rows.append({str(token): {"logprob": value, "rank": 1 if token == top else 2}} | row)
            choice["prompt_logprobs"] = rows
        if self.kind == "echo" and body.get("echo") and body.get("logprobs"):
            values, best, _ = self._prompt(ids)
            tops = [None, *({"a": value, "b": top} for value, (_, top) in zip(values, best, strict=True))]
            choice["logprobs"] = {"token_logprobs": [None, *values, -1.0], "top_logprobs": [*tops, {"a": -1.0}]}
        if self.kind == "llama" and body.get("logprobs"):
            choice["logprobs"] = {"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new)}}

    def _prompt(self, ids):
        with torch.no_grad():
            logits = self.model.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        own = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        top = logits.max(-1)
        return own, list(zip(top.indices.tolist(), top.values.tolist(), strict=True)), logits

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Yield the address while it runs."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply("POST", body)

            def do_GET(self):
                self.reply("GET", {})

            def reply(self, method, body):
                with owner._counting:
                    owner._open += 1
                    owner.at_once = max(owner.at_once, owner._open)
                status, value = owner.answer(method, self.path, body, self.headers)
                with owner._counting:
                    owner._open -= 1
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
