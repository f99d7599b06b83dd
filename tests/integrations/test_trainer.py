"""Distillation in Hugging Face's Trainer: its numbers are those of a single big batch."""

import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import pytest
import torch
from tiny_lms import V
from torch import nn
from trainer_truth import (
    LOSS,
    Projected,
    arguments_of,
    batch_of,
    norm,
    projected_truth,
    rows,
    tiny,
    tokenizer,
    trainer_of,
    truth,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaForSequenceClassification,
    MixtralConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from fastkd import kd_loss
from fastkd.integrations.teachers import moved
from fastkd.integrations.transformers import DistillationMixin, DistillationTrainer
from fastkd.recipes import LM, Distil, Hidden, Linear, OnPolicy, Outputs, Plus

ROOT = Path(__file__).parents[2]


def close(found, expected, names=("loss", "kd", "ce"), prefix=""):
    for name in names:
        assert found[prefix + name] == pytest.approx(expected[name], rel=1e-5), name


def first_line(trainer):
    trainer.train()
    return trainer.state.log_history[0]


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("size, accumulation", [(16, 1), (4, 4), (2, 8), (7, 3)])
def test_a_step_is_that_of_its_whole_batch(tmp_path, size, accumulation):
    """However it is cut: one micro-batch has no target, the last of three is not full."""
    cut = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    line = first_line(trainer_of(tmp_path, arguments=cut))
    student = tiny(0)
    expected = truth(student, tiny(1), rows())
    expected["grad_norm"] = norm(student).item()
    close(line, expected, ("loss", "kd", "ce", "top1_agreement", "grad_norm"))


def test_two_processes(tmp_path):
    """DDP and FSDP2: see trainer_ranks.py."""
    pytest.importorskip("peft")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    folders = (ROOT, ROOT / "tests", ROOT / "tests/integrations")
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("trainer_ranks.py"))
    done = subprocess.run(
        [*launch, script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 18, done.stdout


def test_the_log_is_of_its_window(tmp_path):
    """Averages of two steps; the last window has one."""
    settings = dict(max_steps=3, logging_steps=2, per_device_train_batch_size=4)
    trainer = trainer_of(
        tmp_path, arguments=settings | dict(learning_rate=0.0, logging_strategy="steps")
    )
    trainer.train()
    line = trainer.state.log_history[0]
    parts = [truth(tiny(0), tiny(1), rows()[i : i + 4]) for i in (0, 4)]
    averages = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    close(line, averages)
    trainer.train()  # what the first run has not logged is not of the second
    close(trainer.state.log_history[0], averages)


def test_settings_follow_the_progress(tmp_path):
    settings = dict(max_steps=2, per_device_train_batch_size=16, learning_rate=0.0)
    alpha = Linear(1.0, 0.0)
    trainer = trainer_of(tmp_path, arguments=settings, alpha=alpha, temperature=Linear(2.0, 1.0))
    trainer.train()
    for line, T, a in zip(trainer.state.log_history[:2], (2.0, 1.5), (1.0, 0.5), strict=True):
        close(line, truth(tiny(0), tiny(1), rows(), T, a), ("loss", "kd"))


class TestEvaluation:
    def test_is_over_tokens(self, tmp_path):
        """Seven rows in batches of two, of unequal targets."""
        data = rows()[:7]
        found = trainer_of(tmp_path, eval_dataset=data).evaluate()
        names = ("loss", "kl", "perplexity", "top1_agreement")
        close(found, truth(tiny(0), tiny(1), data), names, "eval_")

    def test_of_terms_with_counts_of_their_own(self, tmp_path):
        data = rows()[:7]
        found = trainer_of(tmp_path, eval_dataset=data, objective=Projected()).evaluate()
        learnt, _, _ = projected_truth(data)
        assert found["eval_loss"] == pytest.approx(learnt.loss.item(), rel=1e-5)

    def test_metrics_see_whole_logits(self, tmp_path):
        data, seen = rows()[:5], {}

        def compute_metrics(prediction):
            seen["shapes"] = [x.shape for x in (prediction.predictions, prediction.label_ids)]
            return {"mine": 1.0, "perplexity": 2.0}

        settings = dict(eval_dataset=data, compute_metrics=compute_metrics)
        found = trainer_of(tmp_path, **settings).evaluate()
        assert found["eval_mine"] == 1.0 and found["eval_perplexity"] == 2.0
        assert seen["shapes"] == [(5, 12, V), (5, 12)]
        close(found, truth(tiny(0), tiny(1), data), ("loss", "kl"), "eval_")
        settings["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
        trainer_of(tmp_path, **settings).evaluate()
        assert seen["shapes"] == [(5, 12), (5, 12)]
        names = dict(label_names=["labels", "input_ids"])
        predicted = trainer_of(tmp_path, arguments=names).predict(data)
        assert [x.shape for x in predicted.label_ids] == [(5, 12), (5, 12)]
        only = trainer_of(tmp_path, arguments=dict(prediction_loss_only=True)).predict(data)
        assert only.predictions is None and only.metrics["test_kl"] > 0

    def test_prediction_without_labels(self, tmp_path):
        data = [{"input_ids": row["input_ids"]} for row in rows()[:3]]
        found = trainer_of(tmp_path).predict(data)
        expected = tiny(0)(input_ids=torch.stack([r["input_ids"] for r in data])).logits
        torch.testing.assert_close(torch.tensor(found.predictions), expected)
        assert "test_loss" not in found.metrics

    def test_the_best_model_by_a_measure_of_ours(self, tmp_path):
        """The largest KL here, to tell it from the last."""
        settings = dict(
            max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            load_best_model_at_end=True, metric_for_best_model="eval_kl", greater_is_better=True,
        )  # fmt: skip
        trainer = trainer_of(tmp_path, arguments=settings, eval_dataset=rows())
        trainer.train()
        kls = [line["eval_kl"] for line in trainer.state.log_history if "eval_kl" in line]
        assert len(kls) == 3 and trainer.state.best_metric == max(kls) > kls[-1]
        assert trainer.evaluate()["eval_kl"] == pytest.approx(max(kls), rel=1e-5)


class TestTeachers:
    def kd(self, folder, teacher, **settings):
        return first_line(trainer_of(folder, teacher_model=teacher, **settings))["kd"]

    def test_in_a_folder_or_as_a_function(self, tmp_path):
        expected = truth(tiny(0), tiny(1), rows())["kd"]
        tiny(1).save_pretrained(tmp_path / "teacher")
        name = str(tmp_path / "teacher")
        offloaded = accelerate.cpu_offload(tiny(1), torch.device("cpu"))
        for teacher in (name, Path(name), LM(tiny(1)), offloaded):
            assert self.kd(tmp_path, teacher) == pytest.approx(expected, rel=1e-5)
        asked = []

        def teacher(batch, hidden_states=False):
            asked.append(torch.is_grad_enabled())
            return LM(tiny(1))(batch)

        assert self.kd(tmp_path, teacher) == pytest.approx(expected, rel=1e-5)
        assert asked == [False]
        half = self.kd(tmp_path, name, teacher_model_init_kwargs={"dtype": torch.bfloat16})
        assert half == pytest.approx(expected, rel=0.05) and half != expected

    def test_adapter(self, tmp_path):
        """In a folder: merged into its base; as a model: as it is."""
        peft = pytest.importorskip("peft")
        tiny(1).save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        adapted = peft.get_peft_model(tiny(1), config)
        config.base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "adapter")
        expected = truth(tiny(0), copy.deepcopy(adapted), rows())["kd"]
        for teacher in (tmp_path / "adapter", adapted):
            assert self.kd(tmp_path, teacher) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("mode", ["probabilities", "logits"])
    def test_several(self, tmp_path, mode):
        tiny(1).save_pretrained(tmp_path / "teacher")
        others = dict(teacher_weights=[0.7, 0.3], teacher_mode=mode, temperature=1.0, alpha=1.0)
        other = tiny(2)
        found = self.kd(tmp_path, [tmp_path / "teacher", other], **others)
        batch = batch_of(rows())
        s, a, b = (m(input_ids=batch["input_ids"]).logits for m in (tiny(0), tiny(1), other))
        mixed = 0.7 * a.softmax(-1) + 0.3 * b.softmax(-1) if mode == "probabilities" else None
        t = 0.7 * a + 0.3 * b if mixed is None else mixed.log()
        assert found == pytest.approx(
            kd_loss(s, t.detach(), batch["labels"], shift=True).item(), rel=1e-5
        )

    def test_is_frozen_and_stays_in_evaluation_mode(self, tmp_path):
        teacher = tiny(1, attention_dropout=0.5).train()
        trainer = trainer_of(tmp_path, teacher_model=teacher)
        teacher.train()
        close(first_line(trainer), truth(tiny(0), tiny(1), rows()))
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_none_for_labels_alone(self, tmp_path):
        line = first_line(trainer_of(tmp_path, teacher_model=None, alpha=0.0))
        assert "kd" not in line
        close(line, truth(tiny(0), tiny(1), rows(), alpha=0.0), ("loss", "ce"))

    def test_with_another_prompt(self, tmp_path):
        """Columns of the teacher's are kept, and not given to the student."""
        data = []
        for row in rows():
            labels = row["labels"].clone()
            labels[0] = -100
            shifted = {"input_ids": torch.cat([row["input_ids"][:1] + 1, row["input_ids"]]) % V}
            shifted["labels"] = torch.cat([torch.tensor([-100]), labels])
            data.append(row | {"labels": labels} | {f"teacher_{k}": x for k, x in shifted.items()})
        batch = {k: torch.stack([r[k] for r in data]) for k in data[0]}
        s = tiny(0)(input_ids=batch["input_ids"]).logits
        t = tiny(1)(input_ids=batch["teacher_input_ids"]).logits[:, 1:].detach()
        expected = kd_loss(s, t, batch["labels"], shift=True, **LOSS)
        lists = datasets.Dataset.from_list([{k: x.tolist() for k, x in r.items()} for r in data])
        for train_dataset in (data, lists):
            line = first_line(trainer_of(tmp_path, train_dataset=train_dataset))
            assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(teacher_model=None), "teacher_model is needed"),
        (dict(objective=Distil(), alpha=0.5), "alpha cannot be set beside an objective"),
        (dict(compute_loss_func=print), "compute_loss_func"),
        (dict(arguments=dict(label_smoothing_factor=0.1)), "label_smoothing_factor=0.1"),
        (dict(teacher_model_init_kwargs={}), "teacher_model_init_kwargs"),
        (dict(teacher_model=[tiny(1)], teacher_weights=[1.0, 2.0]), "1 teachers, but 2"),
        (dict(teacher_model=3), "got int"),
        (dict(temperature=0.0), "temperature"),
        (dict(train_dataset=[{"input_ids": [1, 2]}] * 16), "no labels, only input_ids"),
        (dict(unheard_of=1), "unheard_of"),
        (dict(rewrite=lambda batches: []), "of a step's 1 micro-batches, rewriting left 0"),
        (dict(teacher_model="/no/such"), "there is no folder /no/such"),
        (dict(teacher_model=tiny(1).model), "a model returned no logits"),
        (dict(teacher_model=tiny(1, vocab_size=60)), "token 66, and the teacher knows only 60"),
        (dict(model=tiny(0).requires_grad_(False)), "no parameter of the student requires"),
        (dict(model=None, model_init=lambda: tiny(0), rewrite=OnPolicy(tiny(0), 1.0)), "anew"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_refusals(tmp_path, settings, words):
    with pytest.raises((TypeError, ValueError), match=words) as error:
        trainer_of(tmp_path, **settings).train()
    assert "\n" not in str(error.value)


def test_refused_models(tmp_path):
    student = tiny(0)
    with pytest.raises(ValueError, match="shares weights with the student"):
        trainer_of(tmp_path, model=student, teacher_model=student)
    tiny(1).model.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="lacks 1 weights of the teacher, as lm_head"):
        trainer_of(tmp_path, teacher_model=tmp_path / "body")
    arguments = arguments_of(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs"):
        DistillationTrainer(tiny(0), arguments, teacher_model=tiny(1))


def test_classifiers_are_refused(tmp_path):
    config = tiny(0).config
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match="is no language model: .* have the shape \\(1, 2\\)"):
        trainer_of(tmp_path, model=model)
    with pytest.raises(ValueError, match="teacher's logits are of \\(16,\\) positions"):
        trainer_of(tmp_path, teacher_model=model).train()


def test_a_causal_head_that_looks_ahead_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="BertLMHeadModel predicts the next token, but looks"):
        trainer_of(tmp_path, model=BertLMHeadModel(config))
    config.is_decoder = True
    trainer_of(tmp_path, model=BertLMHeadModel(config))


class TestBatches:
    """What collators give goes in unchanged."""

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_language_modelling(self, tmp_path, side):
        """Padding is not learnt, and not asked for a text's first token."""
        words = tokenizer()
        words.padding_side = side
        data = [{"input_ids": r["input_ids"][: 5 + i % 8] % 60} for i, r in enumerate(rows())]
        collator = DataCollatorForLanguageModeling(words, mlm=False)
        line = first_line(trainer_of(tmp_path, data_collator=collator, train_dataset=data))
        total, count = 0, 0
        for ids in (row["input_ids"][None] for row in data):
            s, t = (m(input_ids=ids).logits.detach() for m in (tiny(0), tiny(1)))
            n = ids.numel() - 1
            total += kd_loss(s, t, ids, shift=True, **LOSS).item() * n
            count += n
        assert line["loss"] == pytest.approx(total / count, rel=1e-5)

    def test_documents_behind_one_another(self, tmp_path):
        data = [{k: x.tolist() for k, x in r.items()} for r in rows()]
        settings = dict(train_dataset=data, data_collator=DataCollatorWithFlattening())
        close(first_line(trainer_of(tmp_path, **settings)), truth(tiny(0), tiny(1), rows()))

    def test_masked_language_models(self, tmp_path):
        """Labels are not shifted."""
        config = BertConfig(
            vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, initializer_range=0.3,
        )  # fmt: skip
        torch.manual_seed(0)
        student, teacher = (BertForMaskedLM(config) for _ in range(2))
        twin = copy.deepcopy(student).eval()
        seen = []
        inner = DataCollatorForLanguageModeling(tokenizer(), mlm=True, mlm_probability=0.3)

        def collator(rows):
            seen.append(inner([{"input_ids": r["input_ids"].tolist()} for r in rows]))
            return seen[-1]

        settings = dict(model=student, teacher_model=teacher, data_collator=collator)
        trainer = trainer_of(tmp_path, **settings, eval_dataset=rows()[:2])
        found = trainer.evaluate()
        (batch,) = seen
        with torch.no_grad():
            s, t = (m(input_ids=batch["input_ids"]).logits for m in (twin, teacher))
        expected = kd_loss(s, t, batch["labels"], **LOSS)
        assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert first_line(trainer)["loss"] > 0

    def test_encoders_with_decoders(self, tmp_path):
        """With generation in the evaluation; the decoder reads what the labels say."""
        config = T5Config(
            vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=V - 2, pad_token_id=V - 2, eos_token_id=V - 1, dropout_rate=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        student, teacher = (T5ForConditionalGeneration(config) for _ in range(2))
        twin = copy.deepcopy(student)
        data = [
            dict(input_ids=[1, 2, 3], labels=[4, 5, V - 1]),
            dict(input_ids=[5], labels=[6, V - 1]),
        ]
        collator = DataCollatorForSeq2Seq(tokenizer())

        class Trainer(DistillationMixin, Seq2SeqTrainer):
            pass

        usual = arguments_of(tmp_path).to_dict()
        arguments = Seq2SeqTrainingArguments(**usual | dict(predict_with_generate=True))
        shapes = []
        trainer = Trainer(
            student, arguments, data_collator=collator, train_dataset=data, eval_dataset=data,
            teacher_model=teacher, processing_class=tokenizer(), **LOSS,
            compute_metrics=lambda x: shapes.append(x.predictions.shape) or {},
        )  # fmt: skip
        batch = dict(collator(data))
        with torch.no_grad():
            s, t = (m(**batch).logits for m in (twin, teacher))
        expected = kd_loss(s, t, batch["labels"], **LOSS).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert shapes[0][0] == 2
        assert first_line(trainer) is not None
        lines = [x for x in trainer.state.log_history if "kd" in x]
        assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)

    def test_rewritten_before_they_are_counted(self, tmp_path):
        def rewrite(batches):
            return [{k: x[:3] for k, x in batch.items()} for batch in batches]

        cut = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
        line = first_line(trainer_of(tmp_path, arguments=cut, rewrite=rewrite))
        kept = [row for i, row in enumerate(rows()) if i % 4 < 3]
        close(line, truth(tiny(0), tiny(1), kept))


class Own(nn.Module):
    """Without a configuration, labels, a cache; of which the backward pass reads the logits."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = tiny(0) if inner is None else inner

    def forward(self, input_ids):
        return {"logits": self.inner(input_ids=input_ids).logits.tanh()}


class Twin(Own):
    def forward(self, input_ids):
        return SimpleNamespace(**super().forward(input_ids))


def bag():
    """No language model of transformers' inside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    model.forward = lambda input_ids: SimpleNamespace(
        logits=nn.Sequential.forward(model, input_ids)
    )
    return model


@pytest.mark.parametrize("inner", [lambda: tiny(0), bag], ids=["wrapper", "other"])
def test_a_module_of_ones_own(tmp_path, inner):
    data = datasets.Dataset.from_list([{k: x.tolist() for k, x in r.items()} for r in rows()])
    line = first_line(trainer_of(tmp_path, model=Own(inner()), train_dataset=data))
    student = Twin(inner())
    expected = truth(student, tiny(1), rows())
    expected["grad_norm"] = norm(student).item()
    close(line, expected, ("loss", "kd", "ce", "grad_norm"))


class TestObjectives:
    def test_that_learns(self, tmp_path):
        learnt, objective, student = projected_truth(rows())
        cut = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
        trainer = trainer_of(tmp_path, arguments=cut, objective=Projected())
        line = first_line(trainer)
        expected = {k: x.item() for k, x in learnt.measures.items()}
        expected |= {"loss": learnt.loss.item(), "grad_norm": norm(student).item()}
        close(line, expected, ("loss", "kd", "hidden", "grad_norm"))
        for p, before in zip(trainer.objective.parameters(), objective.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), before.detach() - 0.1 * before.grad)

    def test_of_hidden_states_beside(self, tmp_path):
        objective = Plus(Distil(**LOSS), Hidden("mse"), 0.5)
        line = first_line(trainer_of(tmp_path, objective=objective, eval_dataset=rows()))
        assert line["loss"] == pytest.approx(
            4 * 0.7 * line["kd"] + 0.3 * line["ce"] + 0.5 * line["mse"], rel=1e-5
        )

    def test_balance_of_experts(self, tmp_path):
        """Another factor trains other weights."""
        weights = []
        for factor in (0.0, 50.0):
            student = tiny(
                0, family=MixtralConfig, num_local_experts=4, num_experts_per_tok=2,
                output_router_logits=True, router_aux_loss_coef=factor,
            )  # fmt: skip
            line = first_line(trainer_of(tmp_path, model=student))
            assert line["auxiliary"] == pytest.approx(factor * 2, rel=0.5)
            weights.append(flat(student))
        assert not torch.equal(*weights)


@pytest.mark.parametrize("logits", ["auto", "whole"])
def test_resumed_is_the_same(tmp_path, logits):
    """Weights, what the objective has learnt, and what the student wrote itself."""

    def trained(folder, steps, checkpoint=None):
        student, objective = tiny(0), Projected()
        writes = OnPolicy(student, 0.5, max_new_tokens=3, pad_token_id=0, eos_token_id=None)
        settings = dict(
            max_steps=steps, save_strategy="steps", save_steps=2, optim="adamw_torch",
            per_device_train_batch_size=4, learning_rate=0.01,
        )  # fmt: skip
        trainer = trainer_of(
            folder, arguments=settings, model=student, objective=objective, rewrite=writes,
            logits=logits,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole, _ = trained(tmp_path / "a", 4), trained(tmp_path / "b", 2)
    resumed = trained(tmp_path / "b", 4, str(tmp_path / "b/checkpoint-2"))
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert torch.equal(flat(whole.objective), flat(resumed.objective))
    assert not torch.equal(flat(whole.objective), flat(Projected()))
    assert whole.state.log_history[:4][-1]["kd"] == resumed.state.log_history[:4][-1]["kd"]


def test_a_checkpoint_without_the_objectives_state_is_refused(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=1)
    trainer_of(tmp_path, arguments=settings).train()
    trainer = trainer_of(tmp_path, arguments=settings | dict(max_steps=2), objective=Projected())
    with pytest.raises(ValueError, match="checkpoint-1 has no objective.safetensors, .* Projected"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_answers_travel_between_devices():
    """Of a teacher elsewhere; the head's weight too."""
    batch, there = batch_of(rows()), torch.device("meta")
    for logits in ("auto", "whole"):
        says = Outputs(*moved(LM(tiny(1).requires_grad_(False), logits)(batch, True), there))
        assert isinstance(says.logits, torch.Tensor) == (logits == "whole")
        assert says.logits.device == getattr(says.logits, "weight", says.logits).device == there
        assert all(x.device == there for x in says.hidden_states)
    assert moved(batch, there)["labels"].device == there


@pytest.mark.parametrize(
    "settings",
    [
        dict(gradient_checkpointing=True),
        dict(torch_compile=True, torch_compile_backend="eager"),
        dict(bf16=True),
    ],
    ids=lambda x: next(iter(x)),
)
def test_trainers_own_settings(tmp_path, settings):
    student = tiny(0)
    expected = truth(student, tiny(1), rows())
    expected["grad_norm"] = norm(student).item()
    line = first_line(trainer_of(tmp_path, arguments=settings))
    rel = 0.02 if "bf16" in settings else 1e-5
    for name in ("loss", "kd", "ce", "grad_norm"):
        assert line[name] == pytest.approx(expected[name], rel=rel), name


def test_in_trl(tmp_path):
    """TRL's data handling, our loss; with an adapter of its making."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")

    class Trainer(DistillationMixin, trl.SFTTrainer):
        pass

    texts = [dict(prompt="w1 w2", completion=" w3" * (1 + i)) for i in range(4)]
    usual = arguments_of(tmp_path).to_dict() | dict(gradient_checkpointing=False)
    for config in (None, peft.LoraConfig(target_modules=["q_proj"])):
        trainer = Trainer(
            tiny(0), trl.SFTConfig(**usual), teacher_model=tiny(1), processing_class=tokenizer(),
            train_dataset=datasets.Dataset.from_list(texts), peft_config=config,
            eval_dataset=datasets.Dataset.from_list(texts), **LOSS,
        )  # fmt: skip
        found = trainer.evaluate()
        line = [x for x in (trainer.train(), *trainer.state.log_history) if "kd" in x][0]
        data = [dict(input_ids=r["input_ids"], labels=r["labels"]) for r in trainer.train_dataset]
        batch = trainer.data_collator(data)
        s, t = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
            for m in (tiny(0), tiny(1))
        )
        expected = kd_loss(s, t, batch["labels"], shift=True, **LOSS).item()
        assert (batch["labels"] == -100).any()
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert ("lora" in str(trainer.model)) == (config is not None)


def test_example(tmp_path):
    """On folders and a file; a model lies in the output."""
    for i, name in enumerate(("teacher", "student")):
        tiny(1 - i).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    lines = [json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    main = runpy.run_path(str(ROOT / "examples/trainer.py"))["main"]
    paths = [str(tmp_path / name) for name in ("student", "teacher", "data.jsonl", "out")]
    found = main(*paths, max_steps=1, use_cpu=True, disable_tqdm=True)
    assert found["eval_kl"] > 0 and (tmp_path / "out/model.safetensors").is_file()
