from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from polar.core.errors import InputError
from polar.corpus.pool import Decoding, HttpEngine, Pool, draw, read_pool

HTTP = {"type": "http", "base_url": "http://127.0.0.1:8000/v1/", "model": "m"}
POLICY = {"name": "a", "kind": "chat", "engine": HTTP}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_pool_has_the_papers_decoding_by_default(tmp_path: Path) -> None:
    (policy,) = read_pool(written(tmp_path, {"policies": [POLICY]})).policies
    assert policy.decoding == Decoding(temperature=1.0, top_p=0.9, top_k=50)
    assert isinstance(policy.engine, HttpEngine)
    assert policy.engine.base_url == "http://127.0.0.1:8000/v1"
    assert (policy.wrapper, policy.weight, policy.step) == ("sft", 1.0, None)


def test_each_engine_and_every_field_is_read(tmp_path: Path) -> None:
    policies = [
        {
            "name": "b",
            "kind": "base",
            "family": "f",
            "step": 1000,
            "weight": 2,
            "engine": {"type": "vllm", "model": "x"},
        },
        {"name": "c", "kind": "chat", "system": "Be brief.", "engine": {"type": "transformers", "model": "y"}},
    ]
    pool = read_pool(written(tmp_path, {"policies": policies}))
    first, second = pool.policies
    assert (first.family, first.step, first.weight, first.wrapper) == ("f", 1000, 2, "pretrain")
    assert second.system == "Be brief."
    assert pool.of_kind("pretrain") == (first,)
    assert pool.of_kind("sft") == (second,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("policies: [", "expected YAML"),
        ("- a", "expected a list of policies under the name policies"),
        ({}, "policies: Field required"),
        ({"policies": []}, "policies: Tuple should have at least 1 item"),
        ({"policies": [POLICY, POLICY]}, "policies: expected different names, found 'a' twice"),
        ({"policies": [{**POLICY, "knid": 1}]}, r"policies\[0\].knid: Extra inputs are not permitted"),
        ({"policies": [{**POLICY, "kind": "instruct"}]}, r"policies\[0\].kind: Input should be 'base' or 'chat'"),
        ({"policies": [{**POLICY, "weight": 0}]}, r"policies\[0\].weight: Input should be greater than 0"),
        ({"policies": [{**POLICY, "decoding": {"top_p": 2}}]}, r"policies\[0\].decoding.top_p: .* less than or equal"),
        ({"policies": [{**POLICY, "kind": "base", "system": "x"}]}, "a base policy takes no system message"),
        ({"policies": [{**POLICY, "engine": {**HTTP, "base_url": "localhost"}}]}, "expected an address such as"),
        ({"policies": [{**POLICY, "engine": {**HTTP, "base_url": "http://h:99999/v1"}}]}, "Port out of range 0-65535"),
        ({"policies": [{**POLICY, "engine": {**HTTP, "base_url": "http://u:secret@h/v1"}}]}, "expected no user, passw"),
        ({"policies": [{**POLICY, "engine": {**HTTP, "extra_body": {"stream": True, "top_p": 0.5}}}]}, "stream, top_p"),
        ({"policies": [{**POLICY, "engine": {"type": "magic", "model": "m"}}]}, "'transformers', 'vllm', 'http'"),
        ({"policies": [{**POLICY, "engine": {**HTTP, "api_key_env": "POLAR_NO_KEY"}}]}, "variable POLAR_NO_KEY is not"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, content: object, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=message) as error:
        read_pool(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not readable as a pool"):
        read_pool(tmp_path / "none.yaml")


def test_the_identity_of_a_policy_leaves_out_where_it_runs() -> None:
    elsewhere = {**HTTP, "base_url": "https://other/v1", "concurrency": 3, "api_key_env": "KEY", "deadline": 1}
    pools = [Pool.model_validate({"policies": [{**POLICY, "engine": engine}]}) for engine in (HTTP, elsewhere)]
    here, there = (pool.policies[0].identity() for pool in pools)
    assert here == there
    hotter = Pool.model_validate({"policies": [{**POLICY, "decoding": {"temperature": 2}}]})
    assert hotter.policies[0].identity() != here


def test_policies_are_drawn_by_weight_without_repetition() -> None:
    pool = Pool.model_validate(
        {"policies": [{**POLICY, "name": name, "weight": w} for name, w in zip("abc", (1, 2, 5), strict=True)]}
    )
    draws = [draw(pool.policies, 2, Random(seed)) for seed in range(8000)]
    assert all(len({policy.name for policy in pair}) == 2 for pair in draws)
    first = Counter(pair[0].name for pair in draws)
    for name, share in zip("abc", (1 / 8, 2 / 8, 5 / 8), strict=True):
        assert abs(first[name] / 8000 - share) < 0.02  # four standard errors
    # Then the second among the rest: P(b second | c first) = 2/3.
    after_c = Counter(pair[1].name for pair in draws if pair[0].name == "c")
    assert abs(after_c["b"] / after_c.total() - 2 / 3) < 0.03
