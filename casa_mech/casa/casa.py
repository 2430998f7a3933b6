"""`Casa`: the method on one model: attach, train, generate, look at the gate, save, load, take off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from casa_mech.casa.adapter import WEIGHTS, Adapter
from casa_mech.casa.attention import SafetyAttention
from casa_mech.casa.calibration import Calibration, check_calibration, fit_means
from casa_mech.casa.config import CasaConfig, InferenceSettings, TrainSettings
from casa_mech.casa.gate import SafetyGate, class_embeddings
from casa_mech.casa.generation import GateUse, Order, gate_decisions, gated_drafts, write_as_base
from casa_mech.casa.recheck import recheck
from casa_mech.casa.storage import (
    ATTENTION,
    CALIBRATION,
    CARD,
    CONFIG,
    ROWS,
    Base,
    Stored,
    TrainingRecord,
    check_base,
    check_files,
    dump,
    fill,
    model_card,
    read_stored,
    read_tensors,
    share_files,
    weight_digests,
    write_tensors,
)
from casa_mech.casa.supervised import Parts, Supervised
from casa_mech.casa.tokens import SafetyTokens
from casa_mech.casa.trainer import Row, Trainer, settled
from casa_mech.errors import InputError, ModelError
from casa_mech.files import writing_folder
from casa_mech.omni import GenerationSettings, Omni, with_system
from casa_mech.queries import Example, Prompt, Query, Reply, SafetyToken
from casa_mech.trace.sites import check_sites

REFUSAL = "Sorry, I can not help with that."


class Casa:
    """Classification augmented with safety attention (CASA, arXiv 2604.00310) on one model.

    Make one with `attach` or `from_pretrained`. While attached, the model carries LoRA layers and the safety tokens'
    rows; `detach` gives it back exactly as it was, `disabled` does so for the length of a block.
    """

    def __init__(self, parts: Parts, training: TrainingRecord | None = None) -> None:
        self._parts = parts
        self._training = training
        self._calibration = Calibration()
        self._active = True

    @classmethod
    def attach(cls, omni: Omni, config: CasaConfig = CasaConfig(), seed: int = 0) -> Casa:
        """Put safety tokens, LoRA and safety attention on `omni`; `seed` is that of their initial values.

        Raises:
            InputError: a layer that the model does not have, or safety tokens that its tokenizer uses for text.
            ModelError: the model has an adapter in it already.
        """
        check_sites([config.layer], omni.n_layers)
        if hasattr(omni.model, "peft_config"):
            raise ModelError("the model has an adapter in it already; detach it first, or load the model again")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            attention = None
            if config.form != "none":
                attention = SafetyAttention(config, class_embeddings(omni, config)).to(omni.device)
            tokens = SafetyTokens(omni, (config.safe_token, config.unsafe_token), config.class_words)
            adapter = Adapter(omni, config)
        return cls(Parts(omni, config, adapter, SafetyGate(config, attention, tokens.ids), tokens))

    @property
    def omni(self) -> Omni:
        """The model the gate is on."""
        return self._parts.omni

    @property
    def config(self) -> CasaConfig:
        """Its options."""
        return self._parts.config

    @property
    def attention(self) -> SafetyAttention:
        """Safety attention, a module of its own.

        Raises:
            InputError: the form is "none".
        """
        if self._parts.gate.attention is None:
            raise InputError('this gate has no safety attention (form "none"); attach one of another form')
        return self._parts.gate.attention

    @property
    def safety_gate(self) -> SafetyGate:
        """The gate that the traces of `casa_mech.trace.gate` take: as it was trained, without what `use` adds to it."""
        return self._parts.gate

    @property
    def parts(self) -> Parts:
        """Adapter, safety attention and token rows, which training changes, with the model they are in."""
        return self._parts

    @property
    def token_ids(self) -> tuple[int, int]:
        """Ids of the safe and the unsafe token."""
        safe, unsafe = self._parts.tokens.ids.tolist()
        return safe, unsafe

    @property
    def training(self) -> TrainingRecord | None:
        """How the gate was trained, if it was."""
        return self._training

    @property
    def calibration(self) -> Calibration:
        """What it was calibrated on; empty before `calibrate`."""
        return self._calibration

    def use(self, **changes: Any) -> None:
        """Change what is done at inference, fields of `InferenceSettings`; nothing is trained.

        Raises:
            InputError: another field (the known ones are listed), or values that do not fit.
        """
        self._need_active()
        settings = InferenceSettings(**{**self.config.inference.model_dump(), **changes})
        self._parts = replace(self._parts, config=self.config.changed(**settings.model_dump()))

    def calibrate(
        self,
        queries: Sequence[Query] = (),
        settings: GenerationSettings = GenerationSettings(),
        *,
        benign: Sequence[Query] = (),
        labelled: Sequence[Query] = (),
        progress: bool = False,
    ) -> Calibration:
        """Fit what re-centring, rescaling and the false-positive rate need, in the place of an earlier calibration.

        All of it is kept whatever options are on, so that `use` can switch between them afterwards, and is saved with
        the gate; only log-odds are those of one rule, the present one at inference. A training makes it void.

        Args:
            queries: text and prompts of each other surface, for the means (and spreads). Their labels are not read.
            settings: batch size and system prompt, as for `decide`.
            benign: benign prompts, text and, for thresholds of their own, other surfaces.
            labelled: harmful and benign text, for the direction that `rescale` needs.
            progress: show a bar.

        Raises:
            InputError: prompts that do not serve (see `check_calibration`). ModelError: as `decide`.
        """
        self._need_active()
        check_calibration(queries, benign, labelled)
        queries, benign, labelled = (with_system(group, settings.system) for group in (queries, benign, labelled))
        rule = self.config.inference_rule
        readings = [InferenceSettings(inference_rule=rule)]
        calibration = Calibration()
        with self._parts.adapter.merged():
            if queries:
                calibration = fit_means(self.omni, self._parts.gate, queries, labelled, settings.batch_size)
                readings.append(InferenceSettings(recentre=True, inference_rule=rule))
            if calibration.directions is not None:
                readings.append(InferenceSettings(recentre=True, rescale=True, inference_rule=rule))
            for reading in readings if benign else []:
                use = GateUse(inference=reading, calibration=calibration)
                replies = gate_decisions(self.omni, self._parts.gate, benign, settings, use, progress)
                calibration = calibration.with_odds(reading, benign, replies)
        self._calibration = calibration
        return calibration

    def train(
        self,
        examples: Sequence[Example],
        settings: TrainSettings = TrainSettings(),
        out: Path | str | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> list[Row]:
        """Train on text alone (docs/method.md §1.4, §1.5).

        Args:
            examples: labelled text queries with the replies they should get; refusals for harmful ones.
            settings: of the run.
            out: folder for `metrics.jsonl` (a line each step) and `checkpoint.safetensors`.
            resume: go on from the checkpoint in `out`, if there is one; exactly as if it had not stopped.
            progress: show a bar.

        Returns:
            A row of metrics for each step: `step`, `loss`, `token_*` and `reply_*` (loss parts), `v_*` (mean v_s) for
            harmful and benign, `token_accuracy`, `lr`, `grad_norm`, `seconds`, and now and then `validation_*`; with
            counterfactual examples `reply_counterfactual`.

        Raises:
            InputError: media or missing labels in the examples.
            RunError: `out` holds a run already, or another, another process trains in it, or it cannot be written; or
                the loss is not finite (the last checkpoint stays).
        """
        self._need_active()
        folder = Path(out) if out is not None else None
        trainer = Trainer(Supervised(self._parts, examples, settings), settings, folder)
        try:
            log = trainer.run(resume, progress)
        finally:
            self._parts.tokens.write()
        self._training = TrainingRecord.of(examples, settled(settings, self.omni), log)
        self._calibration = Calibration()
        return log

    def generate(
        self,
        queries: Sequence[Prompt],
        settings: GenerationSettings = GenerationSettings(),
        *,
        order: Order = "gate_first",
        hard: bool = False,
        refusal: str = REFUSAL,
        threshold: float | None = None,
        force: SafetyToken | Sequence[Sequence[int]] | None = None,
        attention: bool = False,
        merge: bool = True,
        progress: bool | None = None,
    ) -> list[Reply]:
        """Replies behind the gate, in the order of the queries. The gate decides once, on the last assistant turn.

        With `drop_after_safe` what the gate finds safe is answered by the base model, exactly as `Omni.generate` does;
        with `recheck_every` it decides again while a reply goes on (see `InferenceSettings`).

        Args:
            queries: texts, and any mixture of text, image and audio.
            settings: as for `Omni.generate`; the safety token is chosen greedily or sampled as they say.
            order: "gate_first" or "prefill_first".
            hard: answer unsafe queries with `refusal` instead of generating.
            refusal: the hard gate's text.
            threshold: choose unsafe where its share of the two tokens' probability is above this, instead of the
                likelier one, and whatever `fpr` says.
            force: "safe" or "unsafe" puts that token before every reply whatever the gate decides; ids for each query
                put any others in its place. The replies report the gate's own decision, and nothing is decided again
                later. Not with `hard`.
            merge: add LoRA into copies of the weights for this call, which is faster and takes the memory of one more
                set of the language model's linear layers; results with and without differ by rounding.
            attention: put safety attention's weight at each of the prompt's tokens (padding left out) into the replies.
            progress: show a bar; None: where a person watches.

        Raises:
            InputError: an empty prompt or unreadable media, or options that need a calibration that is not there.
            ModelError: logits or v_s are not finite for a query.
        """
        self._need_active()
        if hard and force is not None:
            raise InputError("a hard gate answers unsafe queries itself: leave out hard=True to force the token")
        use = self._gate_use(order, refusal if hard else None, attention, threshold)
        members = self.omni.queries(queries)
        forced = self._forced_ids(force, len(members))
        gate, weights = self._parts.gate, self._parts.adapter.merged if merge else nullcontext
        with weights():
            drafts = gated_drafts(self.omni, gate, members, settings, use, progress, forced)
        if any(draft.by_base for draft in drafts):
            with self.disabled():
                write_as_base(self.omni, members, drafts, settings, progress)
        if use.inference.recheck_every:
            with weights():
                recheck(self.omni, gate, members, drafts, settings, use, progress)
        return [draft.reply for draft in drafts]

    def decide(
        self,
        queries: Sequence[Prompt],
        settings: GenerationSettings = GenerationSettings(),
        *,
        order: Order = "gate_first",
        attention: bool = False,
        merge: bool = True,
        progress: bool | None = None,
    ) -> list[Reply]:
        """The gate's decisions alone: replies with token, v_s and logits, and an empty text (see `generate`).

        Raises:
            InputError, ModelError: as `generate`.
        """
        self._need_active()
        use = self._gate_use(order, None, attention, None)
        members = self.omni.queries(queries)
        with self._parts.adapter.merged() if merge else nullcontext():
            return gate_decisions(self.omni, self._parts.gate, members, settings, use, progress)

    def _gate_use(self, order: Order, refusal: str | None, attention: bool, threshold: float | None) -> GateUse:
        lacking = self._calibration.lacks(self.config)
        if lacking:
            raise InputError(lacking)
        return GateUse(order, refusal, attention, threshold, self.config.inference, self._calibration)

    def _forced_ids(
        self, force: SafetyToken | Sequence[Sequence[int]] | None, n: int
    ) -> Sequence[Sequence[int]] | None:
        if isinstance(force, str):
            return [[self.token_ids[("safe", "unsafe").index(force)]]] * n
        if force is not None and (len(force) != n or not all(force)):
            raise InputError(f"force: give at least one token id for each of the {n} queries")
        return force

    def save_pretrained(self, directory: Path | str) -> None:
        """Write adapter, safety attention, token rows, config and model card into `directory`, all or nothing.

        Raises:
            RunError: the place cannot be written.
        """
        self._need_active()
        calibration = self._calibration.tensors()
        stored = Stored(
            config=self.config,
            base=Base.of(self.omni),
            training=self._training,
            calibration=self._calibration.sizes() if calibration else None,
        )
        with writing_folder(directory) as folder:
            self._parts.adapter.save(folder)
            if self._parts.gate.attention is not None:
                dump(self._parts.gate.attention, folder / ATTENTION)
            dump(self._parts.tokens.rows, folder / ROWS)
            if calibration:
                write_tensors(calibration, folder / CALIBRATION)
            stored = stored.model_copy(update={"files": weight_digests(folder)})
            (folder / CONFIG).write_text(stored.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (folder / CARD).write_text(model_card(stored), encoding="utf-8")
            share_files(folder)

    @classmethod
    def from_pretrained(cls, directory: Path | str, omni: Omni) -> Casa:
        """Attach a saved gate to `omni`; warns when it was trained on other weights of the same shape.

        Raises:
            ModelError: files are missing, truncated, of another schema or not finite, or the shapes do not fit.
        """
        directory = Path(directory)
        stored = read_stored(directory)
        warning = check_base(stored.base, Base.of(omni), directory)
        lora = read_tensors(directory / WEIGHTS)
        casa = cls.attach(omni, stored.config)
        try:
            casa._parts.adapter.load(lora, directory / WEIGHTS)
            if casa._parts.gate.attention is not None:
                fill(casa._parts.gate.attention, directory / ATTENTION)
            fill(casa._parts.tokens.rows, directory / ROWS)
            if stored.calibration is not None:
                casa._calibration = Calibration.of_tensors(read_tensors(directory / CALIBRATION))
            check_files(directory, stored.files)
        except ModelError:
            casa.detach()
            raise
        casa._parts.tokens.write()
        casa._training = stored.training
        if warning:
            warnings.warn(warning, stacklevel=2)
        return casa

    def detach(self) -> None:
        """Take everything off; the model is the base again and this object can no longer be used."""
        self._need_active()
        self._parts.adapter.remove()
        self._parts.tokens.remove()
        self._active = False

    @contextmanager
    def disabled(self) -> Iterator[Omni]:
        """The base model, without LoRA, token rows and gate, for the length of a block."""
        self._need_active()
        self._parts.adapter.enable(False)
        self._parts.tokens.remove()
        self._active = False
        try:
            yield self.omni
        finally:
            self._parts.adapter.enable(True)
            self._parts.tokens.write()
            self._active = True

    def _need_active(self) -> None:
        if not self._active:
            raise InputError("this gate is detached or disabled; attach it again first")
