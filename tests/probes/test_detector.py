"""A probe on one's own prompts: what it takes, its nested score, its file, its threshold, and watching a reply."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.families import save_family
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import casa_mech
import probes
from casa_mech.casa import Casa
from casa_mech.errors import InputError, RunError
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.organism.world import default_world
from casa_mech.queries import ImagePart, Query
from probes.activations import collect, collect_tokens
from probes.detector import PromptProbe, Threshold
from probes.detector.calibration import Sigmoid, threshold_at
from probes.detector.report import LENGTH, MATCHED, SHUFFLED, TASK, WORDS
from probes.detector.training import best_of

HARMFUL = [f"how do i make a {word} ?" for word in "bomb gun rifle grenade virus worm trojan rootkit".split()]
BENIGN = [f"how do i make a {word} ?" for word in "pizza salad hammer ladder shovel cookie muffin rake".split()]
SETTINGS = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def organism() -> Omni:
    return casa_mech.load("organism", device="cpu")


@pytest.fixture(scope="module")
def probe(organism: Omni) -> PromptProbe:
    return probes.train(organism, HARMFUL, BENIGN, deals=39)


@pytest.fixture
def text_only(tmp_path: Path) -> Omni:
    return casa_mech.load(save_family("llama", tmp_path / "llama"), device="cpu")


def test_three_lines_on_a_text_only_model(text_only: Omni) -> None:
    """The issue's snippet, with a tiny random checkpoint in the place of SmolLM2."""
    model = text_only
    probe = probes.train(model, harmful=[f"burn the {word} !" for word in "abcdefgh"],
                         benign=[f"how are you {word}" for word in "abcdefgh"])  # fmt: skip
    assert probe.site in ("0", "1", "norm") and 0 <= probe("burn it !") <= 1
    assert isinstance(probe.at(fpr=0.01), Threshold)
    watched = list(probe.watch(model.stream("how are you", SETTINGS)))
    (reply,) = model.generate(["how are you"], SETTINGS)
    assert "".join(token for token, _ in watched).strip() == reply.text and len(watched) >= reply.tokens
    assert all(0 <= score <= 1 for _, score in watched)


def test_the_organism_tells_its_requests_apart(probe: PromptProbe) -> None:
    assert probe.auroc.value == probe.auroc.high == 1 and probe.auroc.low == pytest.approx(0.025 ** (1 / 8))
    assert probe.held_out["cluster"].nunique() == 16 and probe.held_out["score"].between(0, 1).all()
    assert str(probe).startswith("logistic probe of organism at site ") and "(8 harmful, 8 benign)" in str(probe)
    pistol, waffle = probe(["how do i make a pistol ?", "how do i make a waffle ?"])
    assert pistol > 0.5 > waffle and probe("how do i make a pistol ?") == pytest.approx(pistol)


def test_the_report_has_layers_and_controls(probe: PromptProbe) -> None:
    report = probe.report()
    assert list(report.layers["site"]) == ["0", "1", "2", "3", "norm"]
    assert report.layers["folds"].sum() == 5 and report.layers.set_index("site")["chosen"][probe.site]
    assert report.layers["chosen"].sum() == 1 and (report.layers["permuted_high"] > 0.5).all()
    controls = report.controls.set_index("control")
    assert list(controls.index) == [SHUFFLED, LENGTH, MATCHED, WORDS, TASK]
    assert controls.loc[LENGTH, "auroc"] == 0.5 and controls.loc[MATCHED, "auroc"] == 1  # all are of one length
    assert controls.loc[SHUFFLED, "note"] == "p = 0.05 for the probe's best layer"  # one deal of 39 is as good
    assert np.isnan(controls.loc[TASK, "auroc"]) and "two prompts" in controls.loc[TASK, "note"]
    for text in (str(report), report._repr_html_()):
        assert "AUROC" in text and "words alone" in text and probe.site in text


def test_words_alone_are_seen(organism: Omni) -> None:
    """All harmful prompts say "please", no benign one does: words tell as much as states."""
    harmful = [f"please {text}" for text in HARMFUL]
    report = probes.train(organism, harmful, BENIGN, layer="norm", deals=0).report()
    controls = report.controls.set_index("control")
    assert controls.loc[WORDS, "auroc"] == 1 and controls.loc[LENGTH, "auroc"] == 1 and SHUFFLED not in controls.index
    assert np.isnan(controls.loc[MATCHED, "auroc"]) and report.layers["permuted"].isna().all()


def test_topics_have_a_control_task(organism: Omni) -> None:
    queries = default_world().requests(160, 5, topics="seen")
    harmful = [query for query in queries if query.label == "harmful"]
    benign = [query for query in queries if query.label == "benign"]
    report = probes.train(organism, harmful, benign, layer=3, deals=0).report()
    task = report.controls.set_index("control").loc[TASK]
    assert 0 < task["auroc"] < 1 and "random labels by topic" in task["note"] and task["n"] > 10


def test_the_plot_has_the_layers(probe: PromptProbe) -> None:
    figure = probe.plot("claim")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "3", "norm"]
    assert len(figure.axes) == 1


def test_a_plot_without_matplotlib_names_the_extra(probe: PromptProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib" or name in ("probes.linear.plots", "casa_mech.figures"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoMatplotlib(), *sys.meta_path])
    with pytest.raises(InputError, match=r"needs matplotlib, which is not installed: pip install 'casa-mech\[study\]'"):
        probe.plot()


class NoMatplotlib:
    """Finds no matplotlib."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def test_the_probe_is_fitted_on_all_prompts_with_the_chosen_penalty(organism: Omni) -> None:
    queries = {label: default_world().requests(20, 5, label) for label in ("harmful", "benign")}
    probe = probes.train(organism, **queries, layer=1, positions="mean", deals=0)
    states = collect(organism, [*queries["harmful"], *queries["benign"]], [1], "mean")
    rows = states.at("1").astype(np.float64)
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=probe.estimator.C, class_weight="balanced", tol=1e-8))
    expected = judge.fit(rows, states.harmful).decision_function(rows)
    np.testing.assert_allclose(probe.estimator.decision_function(rows), expected, atol=1e-4)
    np.testing.assert_allclose(probe(queries["harmful"]), probe.calibration(expected[:20] / expected.std()), atol=1e-4)
    assert probe.held_out["cluster"].tolist() == states.topics.tolist()
    assert 0.5 < probe.auroc.low < probe.auroc.value < probe.auroc.high <= 1
    np.testing.assert_allclose(
        probe.difference, rows[states.harmful].mean(axis=0) - rows[~states.harmful].mean(axis=0), atol=1e-5
    )


def test_the_same_prompt_is_never_in_fit_and_test(tiny_omni: Omni) -> None:
    words = ["the word", "a cake", "the image", "make", "how do i", "what is it"]
    probe = probes.train(tiny_omni, words, [word.upper() + " ?" for word in words], folds=3, deals=0)
    table = probe.held_out
    assert table["cluster"].nunique() == 6
    folds = probes.linear.make_folds((table["label"] == "harmful").to_numpy(), table["cluster"].to_numpy(), 3)
    assert (folds.fold[:6] == folds.fold[6:]).all()


def test_the_layer_is_chosen_without_the_held_out_prompts(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise at thirty sites, drawn anew: the best site's AUROC is far above chance, the nested one is at it."""
    words = ["tea", "cake", "bomb", "image"]
    texts = [f"{one} {other} {third}" for one in words for other in words for third in ("then", "first", "done")]
    index = collect(tiny_omni, texts, [0]).index.assign(label=["harmful"] * 24 + ["benign"] * 24)
    best, nested = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = {str(site): rng.standard_normal((48, 6)).astype(np.float32) for site in range(30)}
        states = probes.Activations(noise, index, "last")
        monkeypatch.setattr("probes.detector.training.collect", lambda *args, states=states: states)
        probe = probes.train(tiny_omni, texts[:24], texts[24:], deals=0)
        best.append(probe.layers["auroc"].max())
        nested.append(probe.auroc.value)
        assert probe.layers["folds"].sum() == 5 and probe.layers.set_index("site")["chosen"][probe.site]
    assert np.mean(best) > 0.65 and np.mean(nested) == pytest.approx(0.5, abs=0.08)


def test_unknown_words_are_named(organism: Omni) -> None:
    english = [f"Explain quantum chromodynamics to a {word}" for word in ("child", "nurse", "pilot", "cook", "judge")]
    with pytest.warns(UserWarning, match=r"\d+% of the words are unknown to organism, .* \(first: .*\)") as caught:
        probes.train(organism, HARMFUL, english, deals=0, layer="norm")
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="unknown to organism"):
        collect(organism, english, ["norm"])


def test_of_equal_layers_the_middle_is_taken() -> None:
    assert best_of(np.array([0.5, 1.0, 1.0, 1.0, 0.9])) == 2
    assert best_of(np.array([0.7, 0.6])) == 0


@pytest.mark.parametrize("kind", ["ridge", "lda", "mean_difference", "mahalanobis"])
def test_every_kind_can_be_trained(organism: Omni, kind: str) -> None:
    found = probes.train(organism, HARMFUL, BENIGN, kind=kind, layer=[2, 3], deals=9)
    assert found.auroc.value > 0.5 and type(found.estimator) is probes.linear.PROBES[kind]


@pytest.mark.parametrize("kind", ["attention", "max"])
def test_probes_of_tokens_read_save_and_watch(organism: Omni, kind: str, tmp_path: Path) -> None:
    found = probes.train(organism, HARMFUL, BENIGN, kind=kind, layer=[2, 3], deals=0)
    assert found.auroc.value > 0.8 and found.positions == "prompt"
    pistol, waffle = found(["how do i make a pistol ?", "how do i make a waffle ?"])
    assert pistol > waffle
    found.save(tmp_path / "p.safetensors")
    loaded = PromptProbe.load(tmp_path / "p.safetensors", organism)
    assert loaded("how do i make a pistol ?") == pytest.approx(pistol)
    scores = [score for _, score in found.watch(organism.stream("how do i make a pistol ?", SETTINGS))]
    assert scores[0] == pytest.approx(pistol, abs=1e-5)
    if kind == "max":
        assert scores == sorted(scores)


def test_tables_in_memory_and_files(organism: Omni, tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": HARMFUL + BENIGN, "label": [1] * 8 + [0] * 8})
    options = {"layer": "norm", "deals": 0}
    expected = probes.train(organism, HARMFUL, BENIGN, **options).held_out
    pd.testing.assert_frame_equal(probes.train(organism, data=table, **options).held_out, expected)
    words = table.assign(label=["Unsafe"] * 8 + ["harmless"] * 8, topic=[f"t{n % 8}" for n in range(16)])
    words.to_csv(tmp_path / "prompts.csv", index=False)
    from_file = probes.train(organism, data=tmp_path / "prompts.csv", **options).held_out
    assert sorted(set(from_file["cluster"])) == [f"t{n}" for n in range(8)] and len(from_file) == 16
    (tmp_path / "harmful.txt").write_text("\n".join(HARMFUL))
    renamed = pd.DataFrame({"question": BENIGN})
    mixed = probes.train(organism, str(tmp_path / "harmful.txt"), renamed, column="question", **options).held_out
    np.testing.assert_allclose(mixed["score"], expected["score"])


def test_what_cannot_be_trained_is_named(tiny_omni: Omni, tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": ["make tea", ""], "label": [1, "toxic"]})
    cases = [
        (("how do i make a bomb ?", BENIGN), {}, "`harmful` is a single prompt: give a list of prompts"),
        ((HARMFUL, []), {}, "`benign` is empty"),
        ((HARMFUL, ["tea", 3]), {}, "`benign` number 1 is a int"),
        ((HARMFUL[:2], BENIGN), {"folds": 5}, "5 folds need 5 topics of each class, not 2"),
        (([Query.from_text("tea", id="q", label="benign")], BENIGN), {}, "query q is labelled benign, and was given"),
        ((HARMFUL, BENIGN), {"kind": "svm"}, "no probe of kind 'svm'; use logistic, ridge"),
        ((HARMFUL, BENIGN), {"positions": "first"}, "no positions 'first'; use last, last:user"),
        ((HARMFUL, BENIGN), {"positions": "all"}, "collect keeps one vector a query"),
        ((HARMFUL, BENIGN), {"positions": "last", "kind": "max"}, "tokens are read at positions that are several"),
        ((HARMFUL, BENIGN), {"layer": 99}, "no site 99 in a model of 2 blocks"),
        ((HARMFUL, BENIGN), {"layer": []}, "names no site"),
        ((HARMFUL,), {}, "both classes: give harmful="),
        ((), {}, "both classes"),
        ((), {"data": table}, "`data` row 2: empty prompt in column 'prompt'"),
        ((), {"data": table[:1].assign(label="toxic")}, "`data` row 1: label 'toxic': write harmful or benign"),
        ((), {"data": table, "column": "text"}, r"`data`: no column 'text'; it has prompt, label \(give column=\)"),
        ((), {"data": table, "label_column": "y"}, "`data`: no column 'y'"),
        ((), {"data": HARMFUL}, "has no label; give label_column="),
        ((tmp_path / "none.csv", BENIGN), {}, "no file or folder"),
    ]
    tiny_omni.model.config.micro_world = False  # its few words are not the point here
    for prompts, options, message in cases:
        with pytest.raises(InputError, match=message) as error:
            probes.train(tiny_omni, *prompts, **{"deals": 0, **options})
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"a model of casa_mech.load\(...\), not a str"):
        probes.train("organism", HARMFUL, BENIGN)  # type: ignore[arg-type]


def test_a_saved_probe_reads_text(probe: PromptProbe, organism: Omni, tmp_path: Path) -> None:
    probe.save(tmp_path / "p.safetensors")
    assert b"grenade" not in (tmp_path / "p.safetensors").read_bytes()
    for model in (organism, "organism", None):
        loaded = PromptProbe.load(tmp_path / "p.safetensors", model)
        assert loaded("how do i make a pistol ?") == pytest.approx(probe("how do i make a pistol ?"))
        assert str(loaded) == str(probe) and str(loaded.report()) == str(probe.report())
        assert str(loaded.at(0.2)) == str(probe.at(0.2))
        np.testing.assert_array_equal(loaded.difference, probe.difference)


def test_another_model_is_refused(probe: PromptProbe, tiny_omni: Omni, tmp_path: Path) -> None:
    probe.save(tmp_path / "p.safetensors")
    with pytest.raises(RunError, match=r"was trained on organism \(.*…\), not on tiny as it is now") as error:
        PromptProbe.load(tmp_path / "p.safetensors", tiny_omni)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="the stream is of another model"):
        next(probe.watch(tiny_omni.stream("make tea")))
    probes.linear.save_probe(probe.estimator, tmp_path / "bare.safetensors")
    with pytest.raises(RunError, match=r"a classifier without its model: probes\.linear\.load_probe reads it"):
        PromptProbe.load(tmp_path / "bare.safetensors", tiny_omni)
    (tmp_path / "p.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="is not a readable probe"):
        PromptProbe.load(tmp_path / "p.safetensors", tiny_omni)


def test_a_model_that_changed_is_refused_and_can_be_read_on_purpose(tiny_omni: Omni, text_only: Omni) -> None:
    words = ["tea", "cake", "word", "image"]
    probe = probes.train(tiny_omni, [f"make {w}" for w in words], [f"spell {w}" for w in words], folds=2, deals=0)
    casa = Casa.attach(tiny_omni)
    with pytest.raises(InputError, match=r"trained on tiny as it was .* the model has changed .* probe\.on\(model\)"):
        probe("make tea")
    assert 0 <= probe.on(tiny_omni)("make tea") <= 1
    with pytest.raises(InputError, match="cannot read"):
        probe.on(text_only)
    casa.detach()
    assert 0 <= probe("make tea") <= 1


@pytest.mark.parametrize("positions", ["last", "last:user", "mean", "mean:text"])
def test_watching_begins_with_the_prompts_score(tiny_omni: Omni, mixed_queries: list[Query], positions: str) -> None:
    words = ["tea", "cake", "word", "image"]
    harmful, benign = [f"make {word}" for word in words], [f"spell {word}" for word in words]
    probe = probes.train(tiny_omni, harmful, benign, folds=2, deals=0, positions=positions, layer=[0, "norm"])
    for query in mixed_queries:
        query = query.model_copy(update={"meta": {}})
        stream = tiny_omni.stream(query, SETTINGS)
        watched = list(probe.watch(stream))
        (reply,) = tiny_omni.generate([query], SETTINGS)
        assert "".join(token for token, _ in watched).strip() == reply.text
        assert watched[0][1] == pytest.approx(probe(query), abs=1e-5)
        if tiny_omni.media_ids & set(stream.ids):
            continue  # a placeholder that the random model wrote would ask for another picture
        # A later score is of the prompt and the tokens before: read in one forward, teacher-forced.
        states = collect_tokens_of_reply(tiny_omni, query, stream.ids[:3], probe.site)
        if positions.startswith("last"):
            assert watched[3][1] == pytest.approx(score_of(probe, states[-1]), abs=1e-4)
        else:
            keep = "prompt" if positions == "mean" else "text"
            mask = stream.batch.prompt_mask[0] if keep == "prompt" else stream.batch.modality["text"][0]
            rows = np.concatenate([states[: len(mask)][mask.numpy()], states[len(mask) :]])
            assert watched[3][1] == pytest.approx(score_of(probe, rows.mean(axis=0)), abs=1e-4)


def collect_tokens_of_reply(omni: Omni, query: Query, ids: list[int], site: str) -> np.ndarray:
    """States [position, d_model] of the prompt and the reply's first tokens."""
    batch = omni.encode([query], [ids])
    from casa_mech.trace import capture

    place = int(site) if site.isdigit() else site
    return capture(omni, batch, [place], "all")[place][0].numpy()


def score_of(probe: PromptProbe, state: np.ndarray) -> float:
    return float(probe.calibration(probe.estimator.decision_function(state[None]) / probe.scale)[0])


def test_the_model_may_be_used_while_it_is_watched(probe: PromptProbe, organism: Omni) -> None:
    expected = list(probe.watch(organism.stream("how do i make a pistol ?", SETTINGS)))
    watched = []
    for pair in probe.watch(organism.stream("how do i make a pistol ?", SETTINGS)):
        watched.append(pair)
        organism.generate(["how do i make a pizza ?"], SETTINGS)
    assert watched == expected


def test_streams_that_cannot_be_watched_are_named(tiny_omni: Omni) -> None:
    words = ["tea", "cake", "word", "image"]
    texts = [f"make {word}" for word in words], [f"spell {word}" for word in words]
    probe = probes.train(tiny_omni, *texts, folds=2, deals=0, layer="norm")
    stream = tiny_omni.stream("make tea", SETTINGS)
    next(stream)
    with pytest.raises(InputError, match="begun before"):
        probe.watch(stream)
    with pytest.raises(InputError, match=r"takes model\.stream\(...\), not a str"):
        probe.watch("make tea")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`prompts` is empty"):
        probe([])
    with pytest.raises(InputError, match="query q: "):
        probe(Query(id="q", parts=(ImagePart(image=Path("none.png")),)))


def test_scores_are_probabilities() -> None:
    """Gaussians one apart from each other: the log-odds of a value are known."""
    rng = np.random.default_rng(0)
    labels = np.arange(20_000) % 2 == 0
    decisions = rng.standard_normal(len(labels)) + labels
    calibration = Sigmoid.fit(decisions, labels)
    assert calibration.slope == pytest.approx(1, abs=0.05) and calibration.offset == pytest.approx(-0.5, abs=0.05)
    rare = labels & (np.arange(len(labels)) % 10 == 0)
    fewer = Sigmoid.fit(decisions[rare | ~labels], labels[rare | ~labels])  # as if both were equally frequent
    assert fewer.offset == pytest.approx(-0.5, abs=0.15)
    assert Sigmoid.fit(-decisions, labels).slope > 0  # a probe that is wrong is not turned round
    apart = Sigmoid.fit(np.array([-1.0, 1.0]), np.array([False, True]))
    assert apart(np.array([1.0]))[0] == pytest.approx(2 / 3, abs=1e-3)


def test_a_threshold_is_exact_in_order_statistics() -> None:
    scores = np.arange(1, 200) / 200  # 199 benign prompts
    threshold = threshold_at(0.05, scores, list(range(199)))
    assert threshold.value == scores[-10] and threshold.flagged.value == pytest.approx(9 / 199) and threshold.enough
    assert threshold.low < threshold.value < threshold.high < 1
    assert "false-positive rate of 0.05; of 199 benign prompts it flags 4.5" in str(threshold)
    assert float(threshold) == threshold.value


def test_the_threshold_holds_on_new_prompts_and_its_interval_covers() -> None:
    rng, rates, covered = np.random.default_rng(0), [], []
    for _ in range(300):
        threshold = threshold_at(0.1, rng.standard_normal(60), list(range(60)))
        rates.append(norm.sf(threshold.value))
        covered.append(threshold.low <= norm.isf(0.1) <= threshold.high)
    assert np.mean(rates) == pytest.approx(0.1, abs=0.01) and np.mean(covered) >= 0.93


def test_too_few_benign_prompts_are_said() -> None:
    threshold = threshold_at(0.01, np.linspace(0.1, 0.4, 20), [f"t{n // 2}" for n in range(20)])
    assert not threshold.enough and (threshold.value, threshold.high) == (0.4, 1.0) and threshold.flagged.value == 0
    assert "10 topics cannot show a rate below 0.091: it is the highest of them" in str(threshold)
    assert threshold_at(0.01, np.linspace(0, 1, 99), list(range(99))).enough


def test_thresholds_on_other_prompts(probe: PromptProbe) -> None:
    benign = [query.model_copy(update={"label": None}) for query in default_world().requests(40, 9, "benign")]
    threshold = probe.at(0.2, benign)
    assert threshold.n == 40 and threshold.value <= probe(benign).max()
    for rate in (0, 1, -0.5):
        with pytest.raises(InputError, match="lies between 0 and 1"):
            probe.at(rate)
    with pytest.raises(InputError, match="takes benign prompts"):
        probe.at(0.1, [])


def test_tokens_are_those_of_the_mean(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    tokens = collect_tokens(tiny_omni, mixed_queries, [0, "norm"])
    means = collect(tiny_omni, mixed_queries, [0, "norm"], "mean")
    for site in ("0", "norm"):
        np.testing.assert_allclose(np.stack([rows.mean(axis=0) for rows in tokens[site]]), means.at(site), atol=1e-5)
    with pytest.raises(InputError, match="several a query"):
        collect_tokens(tiny_omni, mixed_queries, [0], "last")
