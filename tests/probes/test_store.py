"""The activation store: what is in it is what the model computed, it can be continued, and damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.full_disk import files_of_at_most
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from casa_mech.casa import Casa
from casa_mech.errors import InputError, RunError
from casa_mech.files import TEMPORARY
from casa_mech.judging.stats import cluster_of
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.sites import all_sites
from probes.activations import ActivationStore, collect, shards
from probes.activations import store as store_module
from probes.linear.separability import pca_plane, transfer_matrix
from probes.linear.validation import make_folds

POSITIONS = ("last", "mean", "mean:image", "every:3", "all", "generated:2")


@pytest.fixture
def store(tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path) -> ActivationStore:
    return ActivationStore.collect(
        tiny_omni, mixed_queries, all_sites(2), POSITIONS, tmp_path / "store", batch_size=3, shard_mb=0
    )


def test_every_site_is_what_hooks_see(tiny_omni: Omni, store: ActivationStore, mixed_queries: list[Query]) -> None:
    seen: dict[str, torch.Tensor] = {}
    block = tiny_omni.blocks[1]

    def keep(name: str, take: int = -1) -> object:
        return lambda _, given, out: seen.__setitem__(name, given[0] if take == 0 else out)

    hooks = [
        block.self_attn.o_proj.register_forward_hook(keep("z.1", 0)),
        block.self_attn.o_proj.register_forward_hook(keep("attention.1")),
        block.mlp.register_forward_hook(keep("mlp.1")),
        block.register_forward_hook(keep("1")),
        block.register_forward_hook(keep("pre.1", 0)),
        tiny_omni.norm.register_forward_hook(keep("norm")),
        tiny_omni.tower("image").register_forward_hook(keep("vision")),
        tiny_omni.tower("audio").register_forward_hook(keep("audio")),
    ]
    batch = tiny_omni.encode([mixed_queries[3]], prefill=False)
    with torch.no_grad():
        tiny_omni.model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    for site in ("z.1", "attention.1", "mlp.1", "1", "pre.1", "norm"):
        rows = store.frame("all", site)
        found = store.tensor(site, "all")[torch.tensor((rows["query_id"] == "both").to_list())]
        torch.testing.assert_close(found.flatten(1), seen[site][0], atol=1e-5, rtol=1e-4)
        assert found.shape[1:] == ((2, 32) if site == "z.1" else (64,))
    vision = store.tensor("vision", "all")[torch.tensor((store.frame("all", "vision")["query_id"] == "both").to_list())]
    torch.testing.assert_close(vision, torch.cat(seen["vision"].pooler_output), atol=1e-5, rtol=1e-4)
    mean = store.frame("mean", "audio")
    found = store.tensor("audio", "mean")[mean.index[mean["query_id"] == "both"][0]]
    torch.testing.assert_close(found, seen["audio"].last_hidden_state.mean(dim=0), atol=1e-5, rtol=1e-4)


def test_positions_agree_with_each_other(store: ActivationStore, mixed_queries: list[Query]) -> None:
    full, last, third = (store.frame(name) for name in ("all", "last", "every:3"))
    assert list(last["query_id"]) == [query.id for query in mixed_queries]
    assert (last["at"] + 1 == last["length"]).all() and (last["tokens"] == 1).all()
    states = store.tensor(0, "all")
    ends = full.groupby("order")["at"].idxmax().to_numpy()
    torch.testing.assert_close(states[torch.tensor(ends)], store.tensor(0, "last"), atol=1e-5, rtol=1e-4)
    chosen = torch.tensor((full["at"] % 3 == 0).to_list())
    torch.testing.assert_close(states[chosen], store.tensor(0, "every:3"), atol=0, rtol=0)
    assert (third["at"] % 3 == 0).all()
    image = store.frame("mean:image")
    assert list(image["query_id"]) == ["image", "both"] and (image["tokens"] == image["image_tokens"]).all()
    assert list(store.frame("mean", "vision")["query_id"]) == ["image", "both"]


def test_generated_tokens_are_its_own(tiny_omni: Omni, store: ActivationStore, mixed_queries: list[Query]) -> None:
    rows = store.frame("generated:2")
    assert rows.groupby("query_id")["at"].max().max() <= 2 and len(rows)
    batch = tiny_omni.encode(mixed_queries[:1], prefill=False)
    ids = tiny_omni.model.generate(**batch.inputs, max_new_tokens=3, suppress_tokens=sorted(tiny_omni.media_ids))
    expected = tiny_omni.until_end(ids[0, batch.inputs["input_ids"].shape[1] :].tolist())
    assert list(rows[rows["query_id"] == "text"]["token"]) == expected
    with torch.no_grad():
        hidden = tiny_omni.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    found = store.tensor("norm", "generated:2")[torch.tensor((rows["query_id"] == "text").to_list())]
    torch.testing.assert_close(found, hidden[0, -3:][: len(expected)], atol=1e-5, rtol=1e-4)


def test_files_are_readable_without_this_package(store: ActivationStore) -> None:
    index = pd.read_parquet(store.root / "index")
    row = index[(index["query_id"] == "audio") & (index["position"] == "last")].iloc[0]
    with safe_open(store.root / "shards" / f"{row['shard']:05d}.safetensors", framework="numpy") as shard:
        vector = shard.get_slice("norm")[int(row["row"])]
    place = store.frame("last").index[store.frame("last")["query_id"] == "audio"][0]
    np.testing.assert_array_equal(vector, store.tensor("norm", "last")[place].numpy())
    assert json.loads((store.root / "store.json").read_text())["positions"] == list(POSITIONS)


def test_store_is_continued_and_added_to(tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path) -> None:
    out = tmp_path / "s"
    first = ActivationStore.collect(tiny_omni, mixed_queries[:2], None, "last", out)
    stamp = (out / "shards" / "00000.safetensors").stat().st_mtime_ns
    (out / "shards" / "00001.safetensors").write_bytes(b"a killed run left this")
    both = ActivationStore.collect(tiny_omni, mixed_queries, None, "last", out)
    assert (len(first), len(both)) == (2, 4)
    assert (out / "shards" / "00000.safetensors").stat().st_mtime_ns == stamp
    whole = ActivationStore.collect(tiny_omni, mixed_queries, None, "last", tmp_path / "t")
    torch.testing.assert_close(both.tensor("norm", "last"), whole.tensor("norm", "last"), atol=1e-5, rtol=1e-4)
    memory = collect(tiny_omni, mixed_queries, positions="last", batch_size=3)
    table = both.activations("last")
    assert table.sites == memory.sites == ("0", "1", "norm")
    pd.testing.assert_frame_equal(table.index, memory.index, check_dtype=False)
    np.testing.assert_allclose(table.states["norm"], memory.states["norm"], atol=1e-5)


def test_another_model_or_plan_is_refused(tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path) -> None:
    out = tmp_path / "s"
    ActivationStore.collect(tiny_omni, mixed_queries[:2], ["norm"], "last", out)
    with pytest.raises(InputError, match="begun with sites"):
        ActivationStore.collect(tiny_omni, mixed_queries, [0], "last", out)
    ActivationStore.collect(tiny_omni, [Query.from_text("what is tea ?", id="text")], ["norm"], "last", out)
    assert len(ActivationStore.open(out)) == 3  # an attacked query keeps its id, and is another query
    with pytest.raises(InputError, match="comes twice"):
        ActivationStore.collect(tiny_omni, [mixed_queries[0]] * 2, ["norm"], "last", out)
    casa = Casa.attach(tiny_omni)
    with pytest.raises(RunError, match="not of tiny as it is now"):
        ActivationStore.collect(tiny_omni, mixed_queries, ["norm"], "last", out)
    casa.detach()
    assert len(ActivationStore.open(out, tiny_omni)) == 3
    with pytest.raises(RunError, match="holds other files"):
        ActivationStore.collect(tiny_omni, mixed_queries, ["norm"], "last", tmp_path)


def test_unknown_names_list_the_known_ones(tiny_omni: Omni, store: ActivationStore, mixed_queries: list[Query]) -> None:
    with pytest.raises(InputError, match=r"no site 'mlp.7' .* audio, vision, embeddings, 0..1, pre.0..pre.1"):
        collect(tiny_omni, mixed_queries, ["mlp.7"])
    with pytest.raises(InputError, match="no positions 'first'; use last"):
        collect(tiny_omni, mixed_queries, positions="first")
    with pytest.raises(InputError, match="one vector a query"):
        collect(tiny_omni, mixed_queries, positions="all")
    with pytest.raises(InputError, match="collected were last, mean"):
        store.tensor("norm", "prefill")
    with pytest.raises(InputError, match="several vectors a query"):
        store.activations("all")
    one = collect(tiny_omni, mixed_queries, ["norm"])
    with pytest.raises(InputError, match="collected were norm"):
        pca_plane(one, "0")
    with pytest.raises(InputError, match="no activations with"):
        one.where(label="unheard of")
    with pytest.raises(InputError, match="of each class"):
        transfer_matrix(one)


def test_frames_follow_the_order_given(tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path) -> None:
    backwards = mixed_queries[::-1]
    found = ActivationStore.collect(tiny_omni, backwards, ["norm"], ("last", "mean"), tmp_path / "s", batch_size=1)
    memory = collect(tiny_omni, backwards, ["norm"], "last", batch_size=1)
    for position in ("last", "mean"):
        assert list(found.frame(position)["query_id"]) == [query.id for query in backwards]
    np.testing.assert_allclose(found.activations("last").states["norm"], memory.states["norm"], atol=1e-6)


def test_damage_is_refused_with_its_reason(store: ActivationStore) -> None:
    path = store.root / "shards" / "00000.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(RunError, match=r"00000.safetensors is cut short .* delete shard 00000"):
        ActivationStore.open(store.root)
    path.unlink()
    with pytest.raises(RunError, match="is missing, and the index names it"):
        ActivationStore.open(store.root)
    save_file({site: value[1:].contiguous() for site, value in tensors.items()}, path)
    with pytest.raises(RunError, match="vectors, its index"):
        ActivationStore.open(store.root)
    save_file(tensors, path, metadata={"order": "of others"})
    with pytest.raises(RunError, match="of other queries or positions"):
        ActivationStore.open(store.root)
    save_file({"norm": tensors["norm"]}, path)
    with pytest.raises(RunError, match="holds the sites norm"):
        ActivationStore.open(store.root)
    path.write_bytes(whole)
    (store.root / "store.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="format 99"):
        ActivationStore.open(store.root)


def test_states_that_are_not_finite_are_named(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    with torch.no_grad():
        tiny_omni.blocks[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="query text: the states at site '1' are not finite"):
        collect(tiny_omni, mixed_queries)


def test_copies_of_a_prompt_are_one_topic(tiny_omni: Omni, tmp_path: Path) -> None:
    """Four prompts without a topic, each three times: plain, written otherwise, and wrapped by an attack."""
    queries = []
    for number in range(4):
        request = f"how do i make tea {number}"
        queries += [
            Query.from_text(request, id=f"a{number}", label="benign"),
            Query.from_text(f"How do I make  tea {number}?", id=f"b{number}", label="benign"),
            Query.from_text(f"say sure : {request}", id=f"c{number}", label="benign", meta={"request": request}),
        ]
    clusters = [str(cluster_of(query)) for query in queries]
    assert len(set(clusters)) == 4 and len(set(clusters[:3])) == 1
    in_memory = collect(tiny_omni, queries, ["norm"])
    on_disk = ActivationStore.collect(tiny_omni, queries, ["norm"], "mean", tmp_path / "topics").activations("mean")
    assert in_memory.topics.tolist() == on_disk.topics.tolist() == clusters
    labels = np.repeat([True, True, False, False], 3)
    fold = make_folds(labels, in_memory.topics, 2).fold
    assert all(len(set(fold[3 * number : 3 * number + 3])) == 1 for number in range(4)), "no copy in another fold"


def test_a_stopped_collection_is_numbered_as_a_whole_one(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches go by length, so what is on disk after a stop is not the first of the queries that were asked for."""
    asked, options = mixed_queries[::-1], {"batch_size": 1, "shard_mb": 0}
    ActivationStore.collect(tiny_omni, asked, None, "last", tmp_path / "whole", **options)
    with monkeypatch.context() as patch:

        def stop(root: Path, number: int, *arguments: object) -> None:
            if number == 2:
                raise KeyboardInterrupt
            shards.write_shard(root, number, *arguments)  # type: ignore[arg-type]

        patch.setattr(store_module, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            ActivationStore.collect(tiny_omni, asked, None, "last", tmp_path / "cut", **options)
    ActivationStore.collect(tiny_omni, asked, None, "last", tmp_path / "cut", **options)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(files) == 2 + 2 * 4
    for file in files:
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    # A store of a release without the list of queries goes on from its index.
    (tmp_path / "cut" / "queries.parquet").unlink()
    more = ActivationStore.collect(
        tiny_omni, [Query.from_text("tea", id="tea"), *asked], None, "last", tmp_path / "cut"
    )
    assert list(more.frame("last")["query_id"]) == [*(query.id for query in asked), "tea"]
    (tmp_path / "cut" / "queries.parquet").write_bytes(b"cut short")
    with pytest.raises(RunError, match=r"queries.parquet is unreadable .* collect again"):
        ActivationStore.collect(tiny_omni, asked, None, "last", tmp_path / "cut")


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path
) -> None:
    options = {"sites": ["norm"], "positions": "all", "out": tmp_path / "store", "batch_size": 1, "shard_mb": 0}
    ActivationStore.collect(tiny_omni, mixed_queries[:1], **options)
    with files_of_at_most(3_000), pytest.raises(RunError) as caught:
        ActivationStore.collect(tiny_omni, mixed_queries, **options)
    assert "cannot write" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
    assert set(ActivationStore.open(tmp_path / "store").frame()["query_id"]) == {"text"}
    whole = ActivationStore.collect(tiny_omni, mixed_queries, **options)
    assert set(whole.frame()["query_id"]) == {"text", "image", "audio", "both"}
    assert len(whole.tensor("norm", "all")) == len(whole.frame("all"))


def test_a_prompt_beyond_the_models_positions_is_refused_before_any_is_run(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_omni.model, "forward", lambda *_, **__: pytest.fail("a prompt was run"))
    long = Query.from_text("cake " * 5_000, id="long")
    with pytest.raises(InputError, match=r"query long: its prompt has 5,0\d\d tokens, and tiny reads at most 4,096"):
        ActivationStore.collect(tiny_omni, [*mixed_queries, long], ["norm"], "last", tmp_path / "store")
