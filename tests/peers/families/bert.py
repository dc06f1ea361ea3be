"""BERT of pytorch_pretrained_bert with gamma and beta, of Google by the converter of that package, of transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peers.common import randomised, tokens
from peers.stubs import stand_ins

from . import Example

SIZE = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 52,
    "max_position_embeddings": 17,
    "type_vocab_size": 4,
}
WORDS, LABELS = 99, 5
IDS = tokens(vocab=WORDS)
TYPES = torch.randint(0, 4, IDS.shape, generator=torch.Generator().manual_seed(3))


@cache
def theirs() -> ModuleType:
    """The package; what it imports to download files is not needed here."""
    with stand_ins("boto3", "botocore", "botocore.exceptions", "requests"):
        import pytorch_pretrained_bert
    return pytorch_pretrained_bert


def old(kind: str, *arguments: int) -> nn.Module:
    """A model of pytorch_pretrained_bert, by the name of its class."""
    config = theirs().BertConfig(WORDS, hidden_act="gelu", **SIZE)
    return randomised(getattr(theirs(), kind), config, *arguments, seed=1)


def hf(kind: str = "BertForPreTraining", **options: Any) -> Callable[[], nn.Module]:
    """Makes a model of transformers, by the name of its class."""

    def made() -> nn.Module:
        import transformers

        config = transformers.BertConfig(vocab_size=WORDS, **{**SIZE, "num_labels": LABELS, **options})
        return randomised(getattr(transformers, kind), config)

    return made


def another() -> nn.Module:
    import transformers

    sizes = {key: value for key, value in SIZE.items() if key not in ("max_position_embeddings", "type_vocab_size")}
    config = transformers.ViTConfig(**sizes, image_size=28, patch_size=14)
    return randomised(transformers.ViTModel, config)


WRONG = {
    "a layer more": hf(num_hidden_layers=3),
    "fewer positions": hf(max_position_embeddings=16),
    "another hub": another,
}


@torch.no_grad()
def pretraining(peer: nn.Module) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        words, following = peer(IDS, TYPES, torch.ones_like(IDS))
        ours = model(IDS, token_type_ids=TYPES)
        return [(words, ours.prediction_logits), (following, ours.seq_relationship_logits)]

    return pairs


def hidden(peer: nn.Module) -> tuple[Tensor, Tensor]:
    """The last hidden states, and the pooled ones."""
    states, pooled = peer(IDS, TYPES, torch.ones_like(IDS))
    return states[-1], pooled


def gamma_beta() -> Example:
    peer = old("BertForPreTraining")
    return Example(
        "bert_gamma_beta",
        peer.state_dict(),
        hf(),
        "pytorch_pretrained_bert BertForPreTraining",
        outputs=pretraining(peer),
        wrong=WRONG,
    )


def gamma_beta_alone() -> Example:
    peer = old("BertModel")

    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        ours = model(IDS, token_type_ids=TYPES)
        return list(zip(hidden(peer), (ours.last_hidden_state, ours.pooler_output), strict=True))

    return Example(
        "bert_gamma_beta",
        {f"bert.{key}": value for key, value in peer.state_dict().items()},
        hf("BertModel"),
        "pytorch_pretrained_bert BertModel",
        outputs=pairs,
        wrong={"a layer more": hf("BertModel", num_hidden_layers=3)},
    )


def gamma_beta_answers() -> Example:
    peer = old("BertForQuestionAnswering")

    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        ours = model(IDS, token_type_ids=TYPES)
        return list(zip(peer(IDS, TYPES), (ours.start_logits, ours.end_logits), strict=True))

    return Example(
        "bert_gamma_beta",
        {key: value for key, value in peer.state_dict().items() if ".pooler." not in key},  # transformers' has none
        hf("BertForQuestionAnswering", num_labels=2),
        "pytorch_pretrained_bert BertForQuestionAnswering",
        outputs=pairs,
        wrong={"of sentences": hf("BertForSequenceClassification", num_labels=2)},
    )


# --- Google's variables ---


def variables(heads: Mapping[str, tuple[int, ...]], seed: int = 5) -> dict[str, Tensor]:
    """Random variables of a checkpoint of Google's BERT, with the names and shapes that modeling.py gives them."""
    width, inner = SIZE["hidden_size"], SIZE["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "bert/embeddings/word_embeddings": (WORDS, width),
        "bert/embeddings/position_embeddings": (SIZE["max_position_embeddings"], width),
        "bert/embeddings/token_type_embeddings": (SIZE["type_vocab_size"], width),
        "bert/embeddings/LayerNorm": (width,),
        "bert/pooler/dense": (width, width),
    }
    for layer in range(SIZE["num_hidden_layers"]):
        at = f"bert/encoder/layer_{layer}"
        shapes |= {f"{at}/attention/self/{name}": (width, width) for name in ("query", "key", "value")}
        shapes |= {
            f"{at}/attention/output/dense": (width, width),
            f"{at}/attention/output/LayerNorm": (width,),
            f"{at}/intermediate/dense": (width, inner),
            f"{at}/output/dense": (inner, width),
            f"{at}/output/LayerNorm": (width,),
        }
    generator, found = torch.Generator().manual_seed(seed), {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.2 if len(shape) == 2 else 0.3)

    for name, shape in {**shapes, **heads}.items():
        last = name.rpartition("/")[2]
        if last == "LayerNorm":
            found |= {f"{name}/gamma": 1 + draw(*shape), f"{name}/beta": draw(*shape)}
        elif last in ("dense", "query", "key", "value"):
            found |= {f"{name}/kernel": draw(*shape), f"{name}/bias": draw(shape[1])}
        else:
            found[name] = draw(*shape)
    return found


def converted(state: Mapping[str, Tensor]) -> nn.Module:
    """The model that pytorch_pretrained_bert's own converter makes of a TensorFlow checkpoint."""
    train = SimpleNamespace(
        list_variables=lambda _: [(name, list(value.shape)) for name, value in state.items()],
        load_variable=lambda _, name: state[name].numpy(),
    )
    model = old("BertForPreTraining")
    with tempfile.TemporaryDirectory() as folder, stand_ins(train=train):
        from pytorch_pretrained_bert import convert_tf_checkpoint_to_pytorch as converter

        config = Path(folder, "bert_config.json")
        config.write_text(json.dumps({"vocab_size": WORDS, "hidden_act": "gelu", **SIZE}), encoding="utf-8")
        out = Path(folder, "pytorch_model.bin")
        with redirect_stdout(None):  # it prints every name
            converter.convert_tf_checkpoint_to_pytorch("bert_model.ckpt", str(config), str(out))
        model.load_state_dict(torch.load(out, weights_only=True))
    return model


PRETRAINING = {
    "cls/predictions/transform/dense": (36, 36),
    "cls/predictions/transform/LayerNorm": (36,),
    "cls/predictions/output_bias": (WORDS,),
    "cls/seq_relationship/output_weights": (2, 36),
    "cls/seq_relationship/output_bias": (2,),
}


def tensorflow() -> Example:
    state = variables(PRETRAINING)
    peer = converted(state)
    training = {f"{name}/adam_{end}": torch.rand(value.shape) for name, value in state.items() for end in "mv"}
    training["global_step"] = torch.tensor(7)
    return Example(
        "bert_tensorflow",
        {**state, **training},
        hf(),
        "pytorch_pretrained_bert's convert_tf_checkpoint_to_pytorch, and its BertForPreTraining",
        outputs=pretraining(peer),
        wrong=WRONG,
        not_written=tuple(training),
        suffix=".npz",
    )


def tensorflow_task(kind: str, head: str, labels: int, pooled: bool) -> Example:
    """A model of run_classifier.py or run_squad.py: one matrix after BertModel, (labels, width)."""
    heads = {f"{head}output_weights": (labels, 36), f"{head}output_bias": (labels,)}
    state = variables({**PRETRAINING, **heads})
    left_out = tuple(PRETRAINING) if pooled else (*PRETRAINING, "bert/pooler/")  # transformers has no pooler for squad
    task = {key: value for key, value in state.items() if not key.startswith(left_out)}
    peer = converted({key: value for key, value in state.items() if key not in heads})

    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        logits = hidden(peer.bert)[pooled] @ state[f"{head}output_weights"].T + state[f"{head}output_bias"]
        ours = model(IDS, token_type_ids=TYPES)
        return [(logits, ours.logits if pooled else torch.stack((ours.start_logits, ours.end_logits), -1))]

    return Example(
        "bert_tensorflow",
        task,
        hf(kind, num_labels=labels),
        "pytorch_pretrained_bert's converter and BertModel, and the matrix of run_classifier.py or run_squad.py",
        outputs=pairs,
        wrong={"of pre-training": hf()},
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "bert_gamma_beta": gamma_beta,
    "bert_gamma_beta BertModel": gamma_beta_alone,
    "bert_gamma_beta questions": gamma_beta_answers,
    "bert_tensorflow": tensorflow,
    "bert_tensorflow classifier": lambda: tensorflow_task("BertForSequenceClassification", "", LABELS, True),
    "bert_tensorflow squad": lambda: tensorflow_task("BertForQuestionAnswering", "cls/squad/", 2, False),
}
ROWS = r"""
bert_gamma_beta: gamma and beta swapped: differs
- norm: {gamma: weight, beta: bias}
+ norm: {gamma: bias, beta: weight}
bert_gamma_beta: query and key swapped: differs
- attention.self.(query|key|value).(weight|bias): attention.self.\1.\2
+ attention.self.query.(weight|bias): attention.self.key.\1
+ attention.self.key.(weight|bias): attention.self.query.\1
+ attention.self.value.(weight|bias): attention.self.value.\1
bert_gamma_beta BertModel: the two norms of a layer swapped: differs
- (attention.output|output).LayerNorm.(weight|bias): \1.LayerNorm.\2
+ attention.output.LayerNorm.(weight|bias): output.LayerNorm.\1
+ output.LayerNorm.(weight|bias): attention.output.LayerNorm.\1
bert_gamma_beta BertModel: gamma and beta of the layers are not renamed: refused
- (**.)LayerNorm.(gamma|beta): \1LayerNorm.<2:norm>
+ bert.embeddings.LayerNorm.(gamma|beta): bert.embeddings.LayerNorm.<1:norm>
bert_gamma_beta questions: words and positions crossed: refused
- bert.embeddings.(word_embeddings|position_embeddings|token_type_embeddings).weight: bert.embeddings.\1.weight
+ bert.embeddings.word_embeddings.weight: bert.embeddings.position_embeddings.weight
+ bert.embeddings.position_embeddings.weight: bert.embeddings.word_embeddings.weight
+ bert.embeddings.token_type_embeddings.weight: bert.embeddings.token_type_embeddings.weight
bert_tensorflow: square kernels not transposed: refused
- kernel: {to: weight, view: in out -> out in, optional: true}
+ kernel: {to: weight, optional: true}
bert_tensorflow: the kernels of attention not transposed: differs
- attention/self/(query|key|value)/: {to: attention.self.\1., table: dense}
+ attention/self/(query|key|value)/kernel: attention.self.\1.weight
+ attention/self/(query|key|value)/bias: attention.self.\1.bias
bert_tensorflow: gamma and beta swapped: differs
- gamma: weight, beta: bias
+ gamma: bias, beta: weight
bert_tensorflow: the norms of a layer swapped: differs
- (attention/output|output)/LayerNorm/(gamma|beta): <1:block>.LayerNorm.<2:name>
+ attention/output/LayerNorm/(gamma|beta): output.LayerNorm.<1:name>
+ output/LayerNorm/(gamma|beta): attention.output.LayerNorm.<1:name>
bert_tensorflow classifier: query and key swapped: differs
- attention/self/(query|key|value)/: {to: attention.self.\1., table: dense}
+ attention/self/query/: {to: attention.self.key., table: dense}
+ attention/self/key/: {to: attention.self.query., table: dense}
+ attention/self/value/: {to: attention.self.value., table: dense}
bert_tensorflow squad: the matrix after the model left out: refused
- cls/squad/output_(weights|bias)
+ cls/squads/output_(weights|bias)
"""
