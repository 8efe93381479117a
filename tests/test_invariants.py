"""The invariants of Local Branch Routing, I1 to I5, and token-for-token equality with the brute-force oracle.

(I4, the router's symmetries, is in test_router.py.)
"""

from __future__ import annotations

import itertools

import pytest
import torch
from models import FAMILIES, tiny_llama, tiny_model
from oracle import decode_row
from scipy.stats import chisquare
from torch import Tensor, nn

from lbr_kernels import Router, TreeTrajectory, generate
from lbr_kernels.ops.tree_shape import path_slots

SHAPES = [(1, 1), (3, 1), (2, 2), (3, 2), (2, 3), (1, 2)]


def trained_looking_router(model, depth: int, **config) -> Router:
    """A router that prefers: random weights, the score head included."""
    router = Router.for_model(model, depth=depth, dim=16, **config).eval()
    torch.manual_seed(depth)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.3)
    return router


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded ids and mask."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def random_prompts(lengths: list[int], vocabulary: int = 53, seed: int = 0) -> list[list[int]]:
    g = seeded(seed)
    return [torch.randint(1, vocabulary, (n,), generator=g).tolist() for n in lengths]


# --- I1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_i1_greedy_width_one_is_model_generate(family):
    model = tiny_model(family)
    inputs = padded(random_prompts([9, 4, 14]))
    want = model.generate(**inputs, max_new_tokens=25, do_sample=False)
    assert torch.equal(generate(model, **inputs, width=1, max_new_tokens=25, do_sample=False), want)
    # A uniform router that takes the first of equal candidates commits the most likely token at any width and depth.
    assert torch.equal(generate(model, **inputs, width=2, depth=2, max_new_tokens=25, do_sample=False), want)


# --- I2 -------------------------------------------------------------------------------------------------------------


def exact_distribution(model, prompt: list[int], length: int, vocabulary: int, temperature: float) -> Tensor:
    """Probability of every continuation of a length, by enumeration."""
    texts = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    ids = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        log_probs = (model(input_ids=ids).logits[:, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    return log_probs.gather(2, texts[..., None])[..., 0].sum(1).exp()


@pytest.mark.parametrize(("width", "depth"), [(3, 1), (2, 2), (3, 2), pytest.param(2, 3, marks=pytest.mark.full)])
def test_i2_uniform_router_is_ancestral_sampling(width, depth):
    """Monte Carlo over all texts of four tokens from a vocabulary of five."""
    vocabulary, length, draws = 5, 4, 20_000
    model = tiny_llama(vocabulary, pad_token_id=None)
    probability = exact_distribution(model, [1, 3, 2], length, vocabulary, 1.3)
    out = generate(
        model, torch.tensor([[1, 3, 2]]), width=width, depth=depth, max_new_tokens=length, do_sample=True,
        temperature=1.3, top_k=0, num_return_sequences=draws, generator=seeded(1),
    )  # fmt: skip
    code = (out[:, 3:] * vocabulary ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = code.bincount(minlength=vocabulary**length)
    # Cells that are expected less than five times are taken together.
    expected = probability * draws
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue > 1e-3
    distance = (counts / draws - probability).abs().sum() / 2
    noise = (2 * probability * (1 - probability) / (torch.pi * draws)).sqrt().sum() / 2
    assert distance < 1.3 * noise, f"total variation {distance:.4f}, sampling noise {noise:.4f}"


def test_i2_can_fail():
    """A router that prefers likely candidates is not ancestral sampling, and the same test sees it."""
    vocabulary, draws = 5, 10_000
    model = tiny_llama(vocabulary, pad_token_id=None)
    probability = exact_distribution(model, [1, 3, 2], 2, vocabulary, 1.0)
    out = generate(
        model, torch.tensor([[1, 3, 2]]), width=3, max_new_tokens=2, do_sample=True, top_k=0,
        router=lambda hidden, valid: hidden[:, :3, 0], num_return_sequences=draws, generator=seeded(1),
    )  # fmt: skip
    counts = (out[:, 3] * vocabulary + out[:, 4]).bincount(minlength=vocabulary**2)
    assert chisquare(counts.double().numpy(), (probability / probability.sum() * draws).numpy()).pvalue < 1e-9


# --- I3 -------------------------------------------------------------------------------------------------------------


def fresh_hidden(model, ids: list[int]) -> Tensor:
    """The head's input at the last position of a plain forward without a cache."""
    found = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return found[0][0, -1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "phi3"])
@pytest.mark.parametrize(("width", "depth"), [(3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("trie", [True, False])
def test_i3_hidden_states_are_fresh_forwards(family, width, depth, trie):
    """Every node of every tree after 50 rolling steps, in a batch of prompts of different length."""
    model = tiny_model(family)
    prompts = random_prompts([3, 17, 8])
    seen: list[tuple[Tensor, Tensor]] = []
    trees: list[Tensor] = []

    def router(hidden: Tensor, valid: Tensor) -> Tensor:
        seen.append((hidden.clone(), valid.clone()))
        return hidden[:, :width, 0]

    out = generate(
        model, **padded(prompts), width=width, depth=depth, trie=trie, router=router, max_new_tokens=52, do_sample=True,
        top_k=0, generator=seeded(2), on_step=lambda step: trees.append(step.tokens),
    )  # fmt: skip
    for step in (0, 1, 49, 50):
        hidden, valid = seen[step]
        for row, prompt in enumerate(prompts):
            committed = out[row, 17 : 17 + step].tolist()
            for layer in range(1, depth + 1):
                for slots in path_slots(width, layer).flatten(0, 1).tolist():
                    if not valid[row, slots[-1]]:
                        continue
                    want = fresh_hidden(model, prompt + committed + trees[step][row, slots].tolist())
                    error = (hidden[row, slots[-1]] - want).norm() / want.norm()
                    assert error <= 1e-4, f"step {step}, row {row}, slots {slots}: relative error {error:.1e}"


# --- I5 -------------------------------------------------------------------------------------------------------------


def replay(model, router: Router | None, trajectory: TreeTrajectory, row: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a trajectory's nodes and choices, by a plain forward for every node (method, section 4)."""
    s = trajectory.settings
    width, depth = s.width, s.depth
    text = trajectory.prompt_ids[row][trajectory.prompt_mask[row]].tolist()
    tokens = trajectory.node_tokens[row].tolist()
    node_log_probs = torch.zeros(len(tokens))
    router_log_probs = torch.zeros(trajectory.num_steps)

    def log_prob(path: list[int], token: int) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([text + path])).logits[0, -1].double()
        return (logits / s.filters.get("temperature", 1.0)).log_softmax(-1)[token]

    layers: list[list[int]] = [[-1]]
    read = 0
    for step in range(int(trajectory.num_committed[row])):
        while len(layers) <= depth:
            parents = len(layers[-1])
            grown = tokens[read : read + parents * width]
            for i, token in enumerate(grown):
                if token >= 0:
                    ancestors, at = [], i // width
                    for layer in reversed(layers[1:]):
                        ancestors.insert(0, layer[at])
                        at //= width
                    node_log_probs[read + i] = log_prob(ancestors, token)
            layers.append(grown)
            read += len(grown)
        choice = int(trajectory.choices[row, step])
        flat = [token for layer in layers[1:] for token in layer]
        if router is not None:
            hidden = torch.zeros(1, len(flat), router.config.hidden_size)
            for layer in range(1, depth + 1):
                for slots in path_slots(width, layer).flatten(0, 1).tolist():
                    if flat[slots[-1]] >= 0:
                        hidden[0, slots[-1]] = fresh_hidden(model, text + [flat[slot] for slot in slots])
            with torch.no_grad():
                scores = router(hidden, width, valid=torch.tensor([flat]) >= 0, temperature=s.router_temperature)
            router_log_probs[step] = scores[0, choice]
        else:
            router_log_probs[step] = -torch.tensor(float(sum(token >= 0 for token in layers[1]))).log()
        text.append(layers[1][choice])
        below = [layer[choice * width**i : (choice + 1) * width**i] for i, layer in enumerate(layers[1:])]
        layers = [[-1], *below[1:]]
    return node_log_probs, router_log_probs


@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_i5_recorded_log_probabilities_are_the_likelihood(family, width, depth):
    """Node by node and choice by choice, on a ragged batch with ends of text inside the trees."""
    model = tiny_model(family)
    router = trained_looking_router(model, depth)
    out = generate(
        model, **padded(random_prompts([3, 8])), width=width, depth=depth, router=router, max_new_tokens=8,
        do_sample=True, temperature=1.2, top_k=0, router_temperature=0.7, eos_token_id=[5, 9, 20, 31, 40],
        generator=seeded(3), return_dict_in_generate=True,
    )  # fmt: skip
    trajectory = out.trajectory
    for row in range(2):
        nodes, choices = replay(model, router, trajectory, row)
        torch.testing.assert_close(trajectory.node_log_probs[row], nodes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trajectory.router_log_probs[row], choices, rtol=1e-5, atol=1e-5)


# --- the oracle -----------------------------------------------------------------------------------------------------

CASES = {
    "sampled": {"do_sample": True, "top_k": 0},
    "filtered": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "ends": {"do_sample": True, "top_k": 0, "eos_token_id": [2, 11, 23, 30, 44, 48]},
    "deterministic": {"do_sample": False},
    "deterministic, ends": {"do_sample": False, "eos_token_id": list(range(1, 53, 4))},
    "drawn route, best children": {"do_sample": False, "router_do_sample": True},
    "best route, drawn children": {"do_sample": True, "top_k": 0, "router_do_sample": False},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.parametrize("trie", [True, False])
@pytest.mark.parametrize("with_router", [True, False])
def test_equals_the_oracle(case, width, depth, trie, with_router):
    """Tokens, trees, choices and log-probabilities of every row of a ragged batch, against brute force."""
    model = tiny_llama()
    router = trained_looking_router(model, depth) if with_router else None
    settings = CASES[case]
    prompts, streams = random_prompts([5, 2, 9]), [4, 0, 2**33]
    out = generate(
        model, **padded(prompts), **settings, width=width, depth=depth, trie=trie, router=router, max_new_tokens=6,
        generator=seeded(7), streams=streams, return_dict_in_generate=True,
    )  # fmt: skip
    trajectory = out.trajectory
    # Without anything drawn there is no seed.
    assert (trajectory.settings.seed is None) == (case in ("deterministic", "deterministic, ends"))
    for row, prompt in enumerate(prompts):
        names = {"eos_token_id": "eos_ids"}
        want = decode_row(
            model, prompt, width=width, depth=depth, max_new_tokens=6, router=router,
            seed=trajectory.settings.seed or 0, stream=streams[row],
            **{names.get(name, name): value for name, value in settings.items()},
        )  # fmt: skip
        count = len(want.tokens)
        assert int(trajectory.num_committed[row]) == count
        assert out.sequences[row, 9 : 9 + count].tolist() == want.tokens
        assert (out.sequences[row, 9 + count :] == 0).all()
        nodes = trajectory.node_tokens[row]
        assert nodes[: len(want.node_tokens)].tolist() == want.node_tokens
        assert (nodes[len(want.node_tokens) :] == -1).all()
        assert trajectory.choices[row, :count].tolist() == want.choices
        assert (trajectory.choices[row, count:] == -1).all()
        found = trajectory.node_log_probs[row, : len(want.node_tokens)]
        torch.testing.assert_close(found, torch.tensor(want.node_log_probs), rtol=1e-5, atol=1e-5)
        found = trajectory.router_log_probs[row, :count]
        torch.testing.assert_close(found, torch.tensor(want.router_log_probs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "depth"), [(3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("do_sample", [True, False])
def test_the_last_position(width, depth, do_sample):
    """A model with learned positions: nodes stand up to the last one, and the text ends there."""
    model = tiny_model("gpt2", n_positions=16)
    prompts = random_prompts([12, 7])
    out = generate(
        model, **padded(prompts), width=width, depth=depth, max_new_tokens=30, do_sample=do_sample, top_k=0,
        generator=seeded(1), return_dict_in_generate=True,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        want = decode_row(
            model, prompt, width=width, depth=depth, max_new_tokens=30, do_sample=do_sample, last_position=15,
            seed=out.trajectory.settings.seed or 0, stream=row,
        )  # fmt: skip
        assert len(prompt) + len(want.tokens) == 16
        assert out.sequences[row, 12 : 12 + len(want.tokens)].tolist() == want.tokens


# --- one seed, one text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "depth"), [(3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_one_seed_one_text(family, width, depth):
    """A row alone, in a batch, in another place of it, padded left or right, with the trie and with the full tree."""
    model = tiny_model(family)
    router = trained_looking_router(model, depth)
    prompts = random_prompts([6, 13, 2, 9])

    def texts(order: list[int], *, trie: bool = True, right: bool = False) -> list[list[int]]:
        inputs = padded([prompts[i] for i in order])
        if right:
            pads = (inputs["attention_mask"] == 0).sum(1).tolist()
            inputs = {
                name: torch.stack([row.roll(-pad) for row, pad in zip(t, pads, strict=True)])
                for name, t in inputs.items()
            }
        width_in = inputs["input_ids"].shape[1]
        out = generate(
            model, **inputs, width=width, depth=depth, router=router, max_new_tokens=20, do_sample=True, trie=trie,
            streams=order, generator=seeded(5),
        )  # fmt: skip
        assert torch.equal(out[:, :width_in], inputs["input_ids"])
        return out[:, width_in:].tolist()

    together = texts([0, 1, 2, 3])
    assert texts([0, 1, 2, 3], trie=False) == together
    assert texts([0, 1, 2, 3], right=True) == together
    assert texts([2, 0, 3, 1]) == [together[i] for i in (2, 0, 3, 1)]
    for i in range(4):
        assert texts([i]) == [together[i]]
        assert texts([i], trie=False) == [together[i]]
