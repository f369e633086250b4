"""A deterministic engine without a model, and small jobs for it; run as a program it samples one job to its end."""

import asyncio
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from polar.core.records import prompt_id
from polar.corpus.engines import Completion, Failure, Request, Result
from polar.corpus.plan import Plan, Prompt
from polar.corpus.pool import Policy, Pool
from polar.corpus.sample import sample_plan


def pool(names: str = "abcd", **engine: object) -> Pool:
    settings = {"type": "http", "base_url": "http://127.0.0.1:1/v1", "model": "none", "batch_size": 3, **engine}
    return Pool.model_validate({"policies": [{"name": name, "kind": "chat", "engine": settings} for name in names]})


def prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id(f"question {number}"), f"question {number}", "sft") for number in range(count)]


class SeededEngine:
    """Text from the seed alone; a share of the samples fails, others in another `run`, whatever the order."""

    in_flight = 3

    def __init__(self, policy: Policy, failing: float = 0, seconds: float = 0, run: int = 0) -> None:
        self.policy, self.failing, self.seconds, self.run = policy, failing, seconds, run
        self.pauses = Random(policy.name)

    async def sample(self, requests: Sequence[Request]) -> list[Result]:
        await asyncio.sleep(self.seconds * self.pauses.random())
        return [Failure("no choices") if self.fails(request) else self.complete(request) for request in requests]

    def fails(self, request: Request) -> bool:
        return Random(f"{self.run} {self.policy.name} {request.seed}").random() < self.failing

    def complete(self, request: Request) -> Completion:
        text = hashlib.sha256(f"{self.policy.name} {request.seed} {request.prompt}".encode()).hexdigest()
        return Completion(text * (1 + request.seed % 3), "stop", 7, 11)

    async def close(self) -> None:
        pass


def files(directory: Path) -> dict[str, bytes]:
    """The corpus itself, without the job's own folder."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file()}


def slow_engine(policy: Policy) -> SeededEngine:
    sys.stdout.write("sampling\n")
    sys.stdout.flush()
    return SeededEngine(policy, seconds=0.6)


if __name__ == "__main__":
    sample_plan(Plan(pool()), prompts(240), sys.argv[1], shard_prompts=20, open_engine=slow_engine)
