"""The homework: what the student's copy holds, and whether the grader is just.

Wrong answers are small changes of the reference (old text -> new text); each must lose points of its own question and of no
other. Right answers written differently must lose none. A submission may do anything: the grader has to survive it.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from xml.etree import ElementTree

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import homework
from homework import (
    ASKED,
    CODE,
    QUESTIONS,
    SHIPPED,
    asked_for,
    blank_out,
    blanks,
    build,
    grade,
    make,
    merge,
    parse,
    run_jobs,
    survivors,
)

CODED = ["q1", "q2", "q3", "q4", "q5"]
REFERENCE = {name: (ROOT / name).read_text() for name in CODE}

# ================================================================================================== wrong answers
# fmt: off
WRONG = [  # (question, file, what is wrong, old, new)
    ("q1", "cosd.py", "forward KL in the wrong direction", "    return kl(log_p, log_q)", "    return kl(log_q, log_p)"),
    ("q1", "cosd.py", "reverse KL in the wrong direction", "    return kl(log_q, log_p)", "    return kl(log_p, log_q)"),
    ("q1", "cosd.py", "ratio of probabilities: underflow", "(a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)", "(a * (a / log_b.exp()).log()).sum(-1)"),
    ("q1", "cosd.py", "an epsilon in place of care", "(a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)", "(a * ((a + 1e-8) / (log_b.exp() + 1e-8)).log()).sum(-1)"),
    ("q1", "cosd.py", "0 · −inf", "(a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)", "(a * (log_a - log_b)).sum(-1)"),
    ("q1", "cosd.py", "the care comes after the product", "(a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)", "torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)"),
    ("q1", "cosd.py", "mean over the vocabulary", "torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)", "torch.where(a > 0, log_a - log_b, 0.0)).mean(-1)"),
    ("q1", "cosd.py", "one number for the batch", "torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)", "torch.where(a > 0, log_a - log_b, 0.0)).sum()"),
    ("q1", "cosd.py", "F.kl_div read forwards", "    return kl(log_p, log_q)", "    return F.kl_div(log_p, log_q, log_target=True, reduction='none').sum(-1)"),
    ("q1", "cosd.py", "gradient into the teacher", "teacher_logits.detach().log_softmax", "teacher_logits.log_softmax"),
    ("q1", "cosd.py", "bf16 stays bf16", ".log_softmax(-1, dtype=at_least_fp32), teacher", ".log_softmax(-1), teacher"),
    ("q1", "cosd.py", "float64 cut to fp32", "return student_logits.log_softmax(-1, dtype=at_least_fp32)", "return student_logits.log_softmax(-1, dtype=torch.float32)"),
    ("q1", "cosd.py", "softmax over the wrong axis", "return student_logits.log_softmax(-1,", "return student_logits.log_softmax(0,"),
    ("q1", "cosd.py", "JSD with beta reversed", "log_p_safe + math.log(beta), log_q_safe + math.log1p(-beta)", "log_q_safe + math.log(beta), log_p_safe + math.log1p(-beta)"),
    ("q1", "cosd.py", "JSD with its weights reversed", "beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)", "(1 - beta) * kl(log_p, log_m) + beta * kl(log_q, log_m)"),
    ("q1", "cosd.py", "JSD from the mixture", "beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)", "beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)"),
    ("q1", "cosd.py", "logits are mixed, not probabilities", "torch.logaddexp(log_p_safe + math.log(beta), log_q_safe + math.log1p(-beta))", "(beta * log_p_safe + (1 - beta) * log_q_safe).log_softmax(-1)"),
    ("q1", "cosd.py", "the mixture is taken for a constant", "torch.logaddexp(log_p_safe + math.log(beta), log_q_safe + math.log1p(-beta))", "torch.logaddexp(log_p_safe + math.log(beta), log_q_safe + math.log1p(-beta)).detach() + 0 * log_q_safe"),
    ("q2", "cosd.py", "shifted by one: the state at the token", "torch.tensor([len(p) - 1 for p in prompts]", "torch.tensor([min(len(p), ids.shape[1] - 1) for p in prompts]"),
    ("q2", "cosd.py", "shifted by one the other way", "torch.tensor([len(p) - 1 for p in prompts]", "torch.tensor([max(len(p) - 2, 0) for p in prompts]"),
    ("q2", "cosd.py", "cut at the longest prompt", "torch.tensor([len(p) - 1 for p in prompts]", "torch.tensor([min(max(map(len, prompts)), ids.shape[1] - mask.shape[1]) for p in prompts]"),
    ("q2", "cosd.py", "EOS not scored", "row, j = mask.nonzero(as_tuple=True)", "row, j = mask[:, 1:].nonzero(as_tuple=True)"),
    ("q2", "cosd.py", "prompt scored", "    return states[row, start[row] + j]", "    row = [i for i, c in enumerate(read) for _ in c]\n    return states[row, [t for c in read for t in range(len(c))]]"),
    ("q2", "cosd.py", "column by column", "row, j = mask.nonzero(as_tuple=True)", "j, row = mask.T.nonzero(as_tuple=True)"),
    ("q2", "cosd.py", "the prefix is forgotten", "states = model.hidden(tokens, cache)  # (B, T, D)\n    start", "states = model.hidden(tokens)\n    start"),
    ("q2", "cosd.py", "no gradient", "    return states[row, start[row] + j]", "    return states.detach()[row, start[row] + j]"),
    ("q2", "cosd.py", "mean over padded tokens", "scored / scored.sum().clamp(min=1)", "scored / scored.numel()"),
    ("q2", "cosd.py", "sum for mean", "scored / scored.sum().clamp(min=1)", "scored"),
    ("q2", "cosd.py", "batchmean over sequences", "scored / scored.sum().clamp(min=1)", "scored / len(scored)"),
    ("q2", "cosd.py", "weights without a last token", "    scored[:, :skip] = 0", "    scored[:, :skip] = 0\n    scored = scored * F.pad(mask[:, 1:], (0, 1))"),
    ("q2", "cosd.py", "emptied rows still count", "rows = (per_row > 0).sum()", "rows = torch.tensor(len(per_row))"),
    ("q2", "cosd.py", "nothing left is NaN", "scored / scored.sum().clamp(min=1)", "scored / scored.sum()"),
    ("q2", "cosd.py", "skip ignored", "    scored[:, :skip] = 0", "    pass"),
    ("q2", "cosd.py", "skip keeps what it should leave out", "    scored[:, :skip] = 0", "    scored[:, skip:] = 0"),
    ("q2", "cosd.py", "the mask is overwritten", "    scored[:, :skip] = 0", "    mask[:, :skip] = False\n    scored = mask.float()"),
    ("q2", "cosd.py", "sequence means are summed", "per_row.clamp(min=1) / rows.clamp(min=1)", "per_row.clamp(min=1)"),
    ("q2", "cosd.py", "padding read in place of the prompt", "p + row[: n - 1] for p, row, n", "row[: n - 1] + p for p, row, n"),
    ("q3", "model.py", "a query does not see itself", "device=k.device) <= slots[..., None]", "device=k.device) < slots[..., None].clamp(min=1)"),
    ("q3", "model.py", "a query sees the slot after its own", "device=k.device) <= slots[..., None]", "device=k.device) <= slots[..., None] + 1"),
    ("q3", "model.py", "everything is visible", "device=k.device) <= slots[..., None]", "device=k.device) <= 0 * slots[..., None] + self.used"),
    ("q3", "model.py", "written one slot too early", "self.values[layer][rows, :, slots] = v.transpose(1, 2)", "self.values[layer][rows, :, (slots - 1).clamp(min=0)] = v.transpose(1, 2)"),
    ("q3", "model.py", "values are not stored", "            self.values[layer][rows, :, slots] = v.transpose(1, 2)\n", ""),
    ("q3", "model.py", "the prefix is not attended to", "        if self.prefix is None:\n            return attend(q, keys", "        if True:\n            return attend(q, keys"),
    ("q3", "model.py", "cache positions off by one under padding", "        cache.length = lengths  #", "        cache.length = lengths - 1  #"),
    ("q3", "model.py", "the padding counts as read", "        cache.length = lengths  #", "        pass  #"),
    ("q3", "model.py", "the first token is predicted from the padding", "device=device), lengths - 1][:, None]", "device=device), -1][:, None]"),
    ("q3", "model.py", "EOS left out of the mask", "            mask.append(running)\n            running = running & ~torch.isin(token, eos_ids)", "            running = running & ~torch.isin(token, eos_ids)\n            mask.append(running)"),
    ("q3", "model.py", "rows go on after EOS", "running = running & ~torch.isin(token, eos_ids)", "running = ~torch.isin(token, eos_ids)"),
    ("q3", "model.py", "the first row to end stops all", "or not running.any()", "or not running.all()"),
    ("q3", "model.py", "the batch never stops early", "or not running.any()", ""),
    ("q3", "model.py", "one token too few", "len(tokens) == max_new_tokens or", "len(tokens) == max(max_new_tokens - 1, 1) or"),
    ("q3", "model.py", "ended rows are not filled with 0", "tokens.append(token * running)", "tokens.append(token)"),
    ("q3", "model.py", "greedy rollouts", "sample(self.head(h)[:, 0], temperature, top_k, top_p, generator)", "sample(self.head(h)[:, 0], 0, top_k, top_p, generator)"),
    ("q3", "model.py", "temperature left out", "sample(self.head(h)[:, 0], temperature, top_k, top_p, generator)", "sample(self.head(h)[:, 0], float(temperature > 0), top_k, top_p, generator)"),
    ("q3", "model.py", "temperature twice", "sample(self.head(h)[:, 0], temperature, top_k, top_p, generator)", "sample(self.head(h)[:, 0] / max(temperature, 1e-3), temperature, top_k, top_p, generator)"),
    ("q3", "model.py", "top-k left out", "sample(self.head(h)[:, 0], temperature, top_k, top_p, generator)", "sample(self.head(h)[:, 0], temperature, None, top_p, generator)"),
    ("q3", "model.py", "the generator is ignored", "sample(self.head(h)[:, 0], temperature, top_k, top_p, generator)", "sample(self.head(h)[:, 0], temperature, top_k, top_p, None)"),
    ("q3", "model.py", "the same random numbers for every token", "sample(self.head(h)[:, 0], temperature, top_k, top_p, generator)", "sample(self.head(h)[:, 0], temperature, top_k, top_p, generator and generator.clone_state())"),
    ("q3", "model.py", "one call's keys are stored a second time", "        if k.shape[2] == self.capacity:\n            self.keys[layer], self.values[layer] = k, v\n", "        if k.shape[2] == self.capacity:\n            self.keys[layer], self.values[layer] = v, k\n"),
    ("q3", "model.py", "only one call's keys are kept", "        if k.shape[2] == self.capacity:", "        if True:"),
    ("q3", "model.py", "room that was never written is seen", "[:, :, : self.used]\n        values", "[:, :, : self.used] + 1\n        values"),
    ("q4", "contexts.py", "the context in the student's prompt", "    system = [] if context is None else [SYSTEM, *encode(context)]", "    system = [SYSTEM, *encode(context or \"style plain\")]"),
    ("q4", "contexts.py", "the teacher's prompt truncated", "else [SYSTEM, *encode(context)]", "else [SYSTEM, *encode(context)[:48]]"),
    ("q4", "contexts.py", "the teacher's prompt truncated from the left", "return system + [USER, *encode(prompt), ASSISTANT]", "return (system + [USER, *encode(prompt), ASSISTANT])[-64:]"),
    ("q4", "contexts.py", "no assistant header for the teacher", "return system + [USER, *encode(prompt), ASSISTANT]", "return system + [USER, *encode(prompt)] + [ASSISTANT] * (context is None)"),
    ("q4", "contexts.py", "the context after the prompt", "return system + [USER, *encode(prompt), ASSISTANT]", "return [USER, *encode(prompt), *system, ASSISTANT]"),
    ("q4", "contexts.py", "the context inside the user's turn", "return system + [USER, *encode(prompt), ASSISTANT]", "return [USER, *encode((context + ' ' if context else '') + prompt), ASSISTANT]"),
    ("q4", "contexts.py", "markers in a text become markers", "return system + [USER, *encode(prompt), ASSISTANT]", "return system + [USER, *ENCODING.encode(prompt, allowed_special='all'), ASSISTANT]"),
    ("q4", "contexts.py", "the prompt is not dressed", "dressed(template, row)\n    return Example", "as_turns(\"user\", row[\"prompt\"])\n    return Example"),
    ("q4", "contexts.py", "shots are not dressed", "context += dressed(template, shot) + as_turns(\"assistant\", expert(shot))", "context += as_turns(\"user\", shot[\"prompt\"]) + as_turns(\"assistant\", expert(shot))"),
    ("q4", "contexts.py", "shots are dressed with the prompt's own solution", "context += dressed(template, shot) + as_turns(\"assistant\", expert(shot))", "context += dressed(template, row | {\"prompt\": shot[\"prompt\"]}) + as_turns(\"assistant\", expert(shot))"),
    ("q4", "contexts.py", "the expert's demonstration is not shown", "context += dressed(template, shot) + as_turns(\"assistant\", expert(shot))", "context += dressed(template, shot) + as_turns(\"assistant\", shot[\"answer\"])"),
    ("q4", "contexts.py", "the prompt before its context", "    context = as_turns(\"system\", text or None) + turns\n", "    context = dressed(template, row) + as_turns(\"system\", text or None) + turns\n"),
    ("q4", "contexts.py", "example turns dropped", "    context = as_turns(\"system\", text or None) + turns\n", "    context = as_turns(\"system\", text or None)\n"),
    ("q4", "contexts.py", "earlier turns of the prompt dropped", "    return [*earlier, last]\n", "    return [last]\n"),
    ("q4", "contexts.py", "shots without their answers", "context += dressed(template, shot) + as_turns(\"assistant\", expert(shot))", "context += dressed(template, shot)"),
    ("q4", "contexts.py", "shots before the example turns", "context += dressed(template, shot) + as_turns(\"assistant\", expert(shot))", "context = dressed(template, shot) + as_turns(\"assistant\", expert(shot)) + context"),
    ("q4", "contexts.py", "the system turn after the example turns", "    context = as_turns(\"system\", text or None) + turns\n", "    context = turns + as_turns(\"system\", text or None)\n"),
    ("q4", "contexts.py", "an empty system turn", "    context = as_turns(\"system\", text or None) + turns\n", "    context = as_turns(\"system\", text) + turns\n"),
    ("q4", "contexts.py", "every turn of the prompt is dressed", "    return [*earlier, last]\n", "    if '{prompt}' in template:\n        earlier = [t | {'content': fill(template, values | {'prompt': t['content']})} for t in earlier]\n    return [*earlier, last]\n"),
    ("q4", "contexts.py", "the first turn is dressed", "*earlier, last = as_turns(\"user\", row[\"prompt\"])", "last, *earlier = as_turns(\"user\", row[\"prompt\"])"),
    ("q4", "contexts.py", "a line's own context is not shown", "as_turns(\"system\", row.get(\"context\", context))", "as_turns(\"system\", context)"),
    ("q4", "contexts.py", "the system turn is not dressed", "        text = fill(template, {\"context\": text}).strip()\n", "        pass\n"),
    ("q4", "contexts.py", "the expert is imitated and graded alike", "row.get(\"answer\", said), said, asked", "said, said, asked"),
    ("q4", "contexts.py", "the student reads the teacher's prompt", "return Example(kind, context or None, row[\"prompt\"],", "return Example(kind, context or None, asked,"),
    ("q5", "cosd.py", "teacher not detached", "teacher_head = rows.scorer.model.head.weight.detach()", "teacher_head = rows.scorer.model.head.weight"),
    ("q5", "cosd.py", "the student's head for the teacher", "teacher_head = rows.scorer.model.head.weight.detach()", "teacher_head = student.head.weight.detach()"),
    ("q5", "cosd.py", "the teacher does not see the context", "        h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)\n        teacher_head", "        h_t = rows.scorer.states(rows.prompts, rows.ids, rows.mask)  # (n, D)\n        teacher_head"),
    ("q5", "cosd.py", "the context in the student's prompt", "h_s = shared_states(student, rows.prompts, rows.ids, rows.mask)  # (n, D)\n    h_t, teacher_head", "h_s = shared_states(student, rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)\n    h_t, teacher_head"),
    ("q5", "cosd.py", "no gradient to the student", "h_s = shared_states(student, rows.prompts, rows.ids, rows.mask)  # (n, D)\n    h_t, teacher_head", "h_s = shared_states(student, rows.prompts, rows.ids, rows.mask).detach().requires_grad_()  # (n, D)\n    h_t, teacher_head"),
    ("q5", "cosd.py", "the student is its own teacher", "        h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)\n        teacher_head", "        h_t = Teacher(student, 'live').states(rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)\n        teacher_head"),
    ("q5", "cosd.py", "gradient into the teacher's states", "        h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)\n        teacher_head", "        h_t = shared_states(rows.scorer.model, rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)\n        teacher_head"),
    ("q5", "cosd.py", "mean in place of the weights", "        loss, h = (weights * d).sum(), entropy(student_logits)", "        loss, h = d.mean(), entropy(student_logits)"),
    ("q5", "cosd.py", "sum in place of the weights", "        loss, h = (weights * d).sum(), entropy(student_logits)", "        loss, h = d.sum(), entropy(student_logits)"),
    ("q5", "cosd.py", "mean of the weighted values", "        loss, h = (weights * d).sum(), entropy(student_logits)", "        loss, h = (weights * d).mean(), entropy(student_logits)"),
    ("q5", "cosd.py", "weights made to sum to one for every part", "        loss, h = (weights * d).sum(), entropy(student_logits)", "        loss, h = (weights * d).sum() / weights.sum(), entropy(student_logits)"),
    ("q5", "cosd.py", "the loss has no graph", "        loss, h = (weights * d).sum(), entropy(student_logits)", "        loss, h = (weights * d).sum().detach(), entropy(student_logits)"),
    ("q5", "cosd.py", "a temperature squared before the loss", "        loss, h = (weights * d).sum(), entropy(student_logits)", "        d = d * 2.0**2\n        loss, h = (weights * d).sum(), entropy(student_logits)"),
    ("q5", "cosd.py", "teacher and student change places", "d = rows.objective(student_logits, teacher_logits, tokens)  # (n,)\n        loss", "d = rows.objective(teacher_logits, student_logits, tokens)  # (n,)\n        loss"),
    ("q5", "cosd.py", "always forward KL", "d = rows.objective(student_logits, teacher_logits, tokens)  # (n,)\n        loss", "d = forward_kl(student_logits, teacher_logits)\n        loss"),
    ("q5", "cosd.py", "temperature in the student's logits", "d = rows.objective(student_logits, teacher_logits, tokens)  # (n,)\n        loss", "d = rows.objective(student_logits / 2, teacher_logits, tokens)  # (n,)\n        loss"),
    ("q5", "cosd.py", "chunks lose the weights", "h_s, student.head.weight, h_t, teacher_head, tokens, rows.objective, weights, chunk\n", "h_s, student.head.weight, h_t, teacher_head, tokens, rows.objective, weights * 0 + 1, chunk\n"),
    ("q5", "cosd.py", "chunks of another objective", "h_s, student.head.weight, h_t, teacher_head, tokens, rows.objective, weights, chunk\n", "h_s, student.head.weight, h_t, teacher_head, tokens, cross_entropy, weights, chunk\n"),
    ("q5", "cosd.py", "chunks leave the student's head out", "h_s, student.head.weight, h_t, teacher_head, tokens, rows.objective, weights, chunk\n", "h_s, student.head.weight.detach(), h_t, teacher_head, tokens, rows.objective, weights, chunk\n"),
    ("q5", "cosd.py", "a teacher always", "    if rows.scorer is not None:\n        h_t", "    if True:\n        h_t"),
    ("q5", "cosd.py", "the log keeps the graph", "    return loss, {\"loss\": loss.detach(), \"entropy\": (weights * h).sum()}", "    return loss, {\"loss\": loss, \"entropy\": (weights * h).sum()}"),
    ("q5", "cosd.py", "the mean entropy is logged, whatever the weights", "    return loss, {\"loss\": loss.detach(), \"entropy\": (weights * h).sum()}", "    return loss, {\"loss\": loss.detach(), \"entropy\": h.mean()}"),
    ("q5", "cosd.py", "backward is called here", "    return loss, {\"loss\": loss.detach(), \"entropy\": (weights * h).sum()}", "    loss.backward(retain_graph=True)\n    return loss, {\"loss\": loss.detach(), \"entropy\": (weights * h).sum()}"),
    ("q5", "cosd.py", "the weights are changed in place", "    return loss, {\"loss\": loss.detach(), \"entropy\": (weights * h).sum()}", "    rows.weights.div_(2)\n    return loss, {\"loss\": loss.detach(), \"entropy\": (weights * h).sum()}"),
    ("q5", "cosd.py", "the likeliest token's probability", "q.gather(-1, tokens)[:, 0], p.gather(-1, tokens)[:, 0]", "q.amax(-1), p.amax(-1)"),
]
# fmt: on

# ================================================================================================== right answers
RIGHT = [  # (question, file, function, what is different, what the student writes there, and beside it)
    (
        "q1",
        "cosd.py",
        "forward_kl",
        "F.kl_div, whose arguments read backwards",
        """
        never = log_p.isneginf()
        return F.kl_div(log_q.masked_fill(never, 0), log_p.masked_fill(never, -1e30), reduction="none", log_target=True).sum(-1)""",
        "",
    ),
    (
        "q1",
        "cosd.py",
        "kl",
        "einsum",
        """
        a, zero = log_a.exp(), torch.zeros(())
        return torch.einsum("...v,...v->...", a, torch.where(a > 0, log_a - log_b, zero.to(a)))""",
        "",
    ),
    (
        "q1",
        "cosd.py",
        "kl",
        "cross-entropy less entropy",
        """
        a = torch.exp(log_a)
        crossed, own = (-(a * x.masked_fill(a == 0, 0)).sum(-1) for x in (log_b, log_a))
        return crossed - own""",
        "",
    ),
    (
        "q1",
        "cosd.py",
        "log_softmax_pair",
        "logsumexp by hand, no_grad for the teacher",
        """
        student_logits = student_logits.to(at_least_fp32)
        with torch.no_grad():
            log_p = teacher_logits.to(at_least_fp32) - teacher_logits.to(at_least_fp32).logsumexp(-1, keepdim=True)
        return student_logits - student_logits.logsumexp(-1, keepdim=True), log_p""",
        "",
    ),
    (
        "q1",
        "cosd.py",
        "jsd",
        "logsumexp of a stack, in a helper with a constant and an import of its own",
        """
        return (1 - beta) * kl(log_q, mixed(log_p, log_q, beta)) + beta * kl(log_p, mixed(log_p, log_q, beta))""",
        """
        from math import log as LN

        TINY = -1e30

        def mixed(log_p, log_q, beta):
            a, b = log_p.clamp(min=TINY), log_q.clamp(min=TINY)
            return torch.stack([a + LN(beta), b + LN(1 - beta)]).logsumexp(0)""",
    ),
    (
        "q2",
        "cosd.py",
        "completion_states",
        "row by row",
        """
        rows = []
        for prompt, tokens, here in zip(prompts, ids, mask):
            whole = torch.tensor([[*prompt, *tokens[here][:-1].tolist()]])
            cache = None if prefix is None else KVCache(model.config, *whole.shape, prefix)
            rows.append(model.hidden(whole, cache)[0, len(prompt) - 1 :])
        return torch.cat(rows)""",
        "",
    ),
    (
        "q2",
        "cosd.py",
        "completion_states",
        "the last token is read too, a mask over all positions",
        """
        n = mask.sum(1)
        tokens = pad_right([list(p) + y[m].tolist() for p, y, m in zip(prompts, ids, mask)])
        first = torch.tensor([[len(p) - 1] for p in prompts])
        cache = KVCache(model.config, *tokens.shape, prefix) if prefix else None
        t = torch.arange(tokens.shape[1])
        return model.hidden(tokens, cache)[(t >= first) & (t < first + n[:, None])]""",
        "",
    ),
    (
        "q2",
        "cosd.py",
        "token_weights",
        "a loop over rows",
        """
        scored = mask.float() * (torch.arange(mask.shape[1]) >= skip)
        if reduction == "token":
            return scored / max(scored.sum().item(), 1)
        rows = [row / row.sum() if row.any() else row for row in scored]
        return torch.stack(rows) / max(1, sum(bool(row.any()) for row in scored))""",
        "",
    ),
    (
        "q3",
        "model.py",
        "KVCache.attend",
        "scatter, and attention written out",
        """
        if self.keys[layer] is None and k.shape[2] < self.capacity:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.keys[layer], self.values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        if k.shape[2] < self.capacity:
            where = slots.expand(len(k), -1)[:, None, :, None].expand_as(k)
            self.keys[layer].scatter_(2, where, k)
            self.values[layer].scatter_(2, where, v)
        else:
            self.keys[layer], self.values[layer] = k, v
        keys = self.keys[layer][:, :, : self.used]
        values = self.values[layer][:, :, : self.used]
        seen = torch.arange(self.used)[None, None] <= slots[:, :, None]
        if self.prefix:
            held = self.prefix.keys[layer], self.prefix.values[layer]
            keys, values = (torch.cat([p.expand(len(k), -1, -1, -1), x], 2) for p, x in zip(held, (keys, values)))
            seen = F.pad(seen, (self.offset, 0), value=True)
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = q @ keys.mT / math.sqrt(q.shape[-1])
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ values""",
        "",
    ),
    (
        "q3",
        "model.py",
        "GPT.generate",
        "a for loop, and what it calls",
        """
        h = last_states(self.hidden(ids, cache), lengths)
        cache.length = cache.length - (L - lengths)
        out, seen, alive = torch.zeros(B, max_new_tokens, dtype=torch.long), torch.zeros(B, max_new_tokens).bool(), torch.full((B,), True)
        for i in range(max_new_tokens):
            chosen = sample(self.head(h), temperature, top_k, top_p, generator)
            out[:, i], seen[:, i] = torch.where(alive, chosen, 0), alive
            alive = alive & ~(chosen[:, None] == eos_ids[None]).any(1)
            if not alive.any() or i + 1 == max_new_tokens:
                return out[:, : i + 1], seen[:, : i + 1]
            h = self.hidden(out[:, i : i + 1], cache)[:, 0]""",
        """
        def last_states(h, lengths):
            return torch.stack([row[n - 1] for row, n in zip(h, lengths.tolist())])""",
    ),
    (
        "q4",
        "contexts.py",
        "render",
        "a list that grows",
        """
        ids = []
        if context is not None:
            ids.append(SYSTEM)
            ids.extend(encode(context))
        ids += [USER] + encode(prompt)
        ids.append(ASSISTANT)
        return ids""",
        "",
    ),
    (
        "q4",
        "contexts.py",
        "dressed",
        "a copy whose last turn is replaced",
        """
        turns = [dict(turn) for turn in as_turns("user", row["prompt"])]
        if "{prompt}" in template:
            text = turns[-1]["content"]
            turns[-1]["content"] = fill(template, {**row, "prompt": text, "attempt": attempt})
        return turns""",
        "",
    ),
    (
        "q4",
        "contexts.py",
        "file_example",
        "one list of turns, by a helper",
        """
        said = row["context"] if "context" in row else context
        system, turns = split_system(as_turns("system", said))
        words = "".join(system)
        if template.count("{context}"):
            words = fill(template, dict(context=words)).strip()
        shown = ([say("system", words)] if words else []) + turns
        for shot in shots:
            shown = [*shown, *dressed(template, shot), say("assistant", expert(shot))]
        wanted = row["answer"] if "answer" in row else expert(row)
        return Example(kind=kind, context=shown or None, prompt=row["prompt"], answer=wanted,
                       expert=expert(row), asked=dressed(template, row), row=row)""",
        """
        def say(role, content):
            return {"role": role, "content": content}""",
    ),
    (
        "q5",
        "cosd.py",
        "cosd_loss",
        "always by chunks, one as long as everything",
        """
        h_t, head_t = None, None
        if rows.scorer is not None:
            h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)
            head_t = rows.scorer.model.head.weight
        h_s = completion_states(student, rows.prompts, rows.ids, rows.mask)
        given = h_s, student.head.weight, h_t, head_t, tokens, rows.objective, weights
        loss, _, entropies = chunked_objective(*given, chunk or len(tokens))
        return loss, {"loss": loss.detach(), "entropy": entropies @ weights.to(entropies)}""",
        "",
    ),
    (
        "q5",
        "cosd.py",
        "cosd_loss",
        "chunks by hand, the loss as an inner product",
        """
        h_s, h_t = shared_states(student, rows.prompts, rows.ids, rows.mask), None
        if rows.scorer is not None:
            h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)
        values, entropies = [], []
        for i in range(0, len(weights), chunk or len(weights)):
            here = slice(i, i + (chunk or len(weights)))
            with torch.no_grad():
                theirs = None if h_t is None else rows.scorer.model.head(h_t[here])
            ours = student.head(h_s[here])
            values.append(rows.objective(ours, theirs, tokens[here]))
            entropies.append(entropy(ours))
        d, h = torch.cat(values), torch.cat(entropies)
        loss = torch.einsum("n,n->", weights.to(d.dtype), d)
        log = {"loss": loss, "entropy": (weights * h).sum()}
        return loss, {name: value.detach() for name, value in log.items()}""",
        "",
    ),
]


def changed(file, old, new):
    assert REFERENCE[file].count(old) == 1, f"{file} has {REFERENCE[file].count(old)} of: {old}"
    return REFERENCE[file].replace(old, new)


def filled_in(file, function, body, beside):
    """The reference with another body (or its end) of one function, and new top-level names before it or its class."""
    lines = REFERENCE[file].splitlines()
    (blank,) = [b for b in blanks(file, REFERENCE[file]) if b.asked.function == function]
    lines[blank.first - 1 : blank.last] = textwrap.indent(
        textwrap.dedent(body).strip("\n"), blank.indent
    ).splitlines()
    before = next(
        i
        for i, line in enumerate(lines)
        if re.match(rf"(def|class) {function.partition('.')[0]}\b", line)
    )
    lines[before:before] = (
        [*textwrap.dedent(beside).strip("\n").splitlines(), "", ""] if beside else []
    )
    return "\n".join(lines) + "\n"


# ================================================================================================= is it just?
@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Every answer, tested in one process for all: {(question, what): result}."""
    answers = []
    for question, file, what, old, new in WRONG:
        if REFERENCE[file].count(old) == 1:  # else its own test says so
            answers.append((question, file, what, changed(file, old, new)))
    wrong = len(answers)
    answers += [
        (
            question,
            QUESTIONS[question].files[0],
            "reference",
            REFERENCE[QUESTIONS[question].files[0]],
        )
        for question in CODED
    ]
    for question, file, function, what, body, beside in RIGHT:
        answers.append((question, file, what, filled_in(file, function, body, beside)))
    folder, jobs = tmp_path_factory.mktemp("answers"), []
    for number, (question, file, _, text) in enumerate(answers):
        submission, project = folder / f"submission{number}", folder / f"project{number}"
        submission.mkdir(), project.mkdir()
        (submission / file).write_text(text)
        build(submission, question, project)
        job = {"folder": str(project), "question": question, "seed": number}
        jobs.append(job | {"maxfail": int(number < wrong), "assert": "plain"})
    results, ended, said = run_jobs(jobs, 300, folder)
    assert len(results) == len(jobs), f"{ended}\n{said}"
    return {(question, what): result for (question, _, what, _), result in zip(answers, results)}


def points(result):
    return sum(test["score"] for test in result["tests"])


@pytest.mark.parametrize(
    "question, file, what, old, new", WRONG, ids=[f"{w[0]}: {w[2]}" for w in WRONG]
)
def test_a_wrong_answer_loses_points_of_its_question_alone(question, file, what, old, new, graded):
    answer = changed(file, old, new)
    result = graded[question, what]
    assert result["status"] == 1 and not result["broken"]
    assert points(result) < QUESTIONS[question].points
    for other in CODED:  # the other questions get a project without a trace of it
        wanted = asked_for(other, file)
        if other != question and wanted:
            assert (
                merge(REFERENCE[file], *parse(file, answer.encode()), wanted, file)
                == REFERENCE[file]
            )


@pytest.mark.parametrize(
    "question, what", [*((q, "reference") for q in CODED), *((r[0], r[3]) for r in RIGHT)], ids=str
)
def test_the_reference_and_right_answers_that_look_otherwise(question, what, graded):
    result = graded[question, what]
    assert [test for test in result["tests"] if test["reason"]] == [] and result["status"] == 0
    assert points(result) == QUESTIONS[question].points


def test_there_are_enough_of_both():
    assert (
        len(WRONG) >= 30
        and len(RIGHT) >= 8
        and {w[0] for w in WRONG} == {r[0] for r in RIGHT} == set(CODED)
    )


# ============================================================================================ the student's copy
@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "homework"
    make(folder)
    return folder


def test_what_is_asked_for_is_as_it_should_be():
    """A hint fits into a string and on a line; a blank is short; what is asked for is one file a question."""
    for file in CODE:
        for blank in blanks(file, REFERENCE[file]):
            hint = blank.asked.hint
            assert '"' not in hint and "\\" not in hint and blank.last - blank.first < 24
            assert QUESTIONS[blank.asked.question].files == (file,)
    assert {asked.question for asked in ASKED} == set(CODED)
    assert len({(asked.file, asked.function) for asked in ASKED}) == len(ASKED)
    with pytest.raises(LookupError, match="kl has no statement"):
        source = REFERENCE["cosd.py"].replace("return kl(log_p, log_q)", "pass")
        blanks("cosd.py", source)


def test_the_points_of_the_tests_are_those_of_the_table():
    tree, found = (
        ast.parse((ROOT / "tests" / "test_questions.py").read_text()),
        dict.fromkeys(QUESTIONS, 0),
    )
    for call in (
        d
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for d in node.decorator_list
        if isinstance(d, ast.Call)
    ):
        if call.func.attr in found:
            found[call.func.attr] += call.keywords[0].value.value
    assert found == {name: question.points for name, question in QUESTIONS.items()}
    assert sum(q.points + q.by_hand for name, q in QUESTIONS.items() if name != "q8") == 100


def test_points_and_lines_of_the_handout():
    handout = re.search(
        r"<!-- questions -->(.*)<!-- instructors -->", homework.HANDOUT.read_text(), re.S
    )[1]
    sections = dict(re.findall(r"^## (q\d)\b(.*?)(?=^## |\Z)", handout, re.M | re.S))
    assert sections.keys() == QUESTIONS.keys()
    for name, question in QUESTIONS.items():
        assert f"({question.points + question.by_hand} points" in sections[
            name
        ] and " minutes. Hand in " in sections[name].replace("\n", " ")
        assert all(f"`{file}`" in sections[name] for file in question.files)
        assert all(part in sections[name] for part in ("*Hint.*", "*Low on resources?*")) and (
            name == "q8" or "*Numbers.*" in sections[name]
        )
        to_write = []
        for file in CODE:
            lines = REFERENCE[file].splitlines()
            for blank in blanks(file, REFERENCE[file]):
                if blank.asked.question == name:
                    to_write += lines[blank.first - 1 : blank.last]
        to_write = [line for line in to_write if not line.strip().startswith("#")]
        if to_write:
            said = int(re.search(r" (\d+) lines, ", sections[name])[1])
            assert abs(said - len(to_write)) <= 2, f"{name}: {len(to_write)} lines"
    (code,) = re.findall(r"```python\n(.*?)```", handout, re.S)
    assert subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    ).stdout.startswith(re.search(r"# (0\.\d+)\n", code)[1])


def test_the_copy_is_the_project_less_the_solutions(copy):
    shipped = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert shipped == {*SHIPPED, "README.md"}
    removed = []
    for file in CODE:
        text, gone = blank_out(file, REFERENCE[file])
        removed += gone
        assert (copy / file).read_text() == text
        ours, theirs = (ast.parse(t) for t in (REFERENCE[file], text))
        assert [ast.get_docstring(n) for n in homework.functions(ours).values()] == [
            ast.get_docstring(n) for n in homework.functions(theirs).values()
        ]
        assert [ast.unparse(n.args) for n in homework.functions(ours).values()] == [
            ast.unparse(n.args) for n in homework.functions(theirs).values()
        ]
    assert len(removed) > 50 and survivors(copy, removed) == []
    assert (
        "The first five minutes" in (copy / "README.md").read_text()
        and "solutions" not in (copy / "notebooks" / "homework.md").read_text()
    )
    assert not any(
        line in path.read_text()
        for line in removed
        if len(line.strip()) >= 24
        for path in copy.rglob("*.*")
    )


def test_a_survivor_is_found_wherever_it_hides(copy, tmp_path):
    removed = ["        running = running & ~torch.isin(token, eos_ids)\n"]
    (tmp_path / "plain.py").write_text(
        "x = 1\n  running =  running & ~torch.isin(token, eos_ids)   # a comment\n"
    )
    cell = {
        "cell_type": "code",
        "source": ["a\n", "running = running & ~torch.isin(token, eos_ids)"],
        "outputs": [],
    }
    shown = {
        "cell_type": "code",
        "source": [],
        "outputs": [
            {"data": {"text/plain": ["running = running & ", "~torch.isin(token, eos_ids)"]}}
        ],
    }
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}))
    (tmp_path / "b.ipynb").write_text(json.dumps({"cells": [shown]}))
    assert [found.partition(":")[0] for found in survivors(tmp_path, removed)] == [
        "a.ipynb",
        "b.ipynb",
        "plain.py",
    ]


def test_questions_can_be_handed_out_solved(tmp_path):
    make(tmp_path / "later", solved=("q1", "q2"))
    assert set(CODED) - set(
        re.findall(
            r'Error\("(q\d):', "".join((tmp_path / "later" / file).read_text() for file in CODE)
        )
    ) == {"q1", "q2"}
    with pytest.raises(SystemExit, match="not empty"):
        make(tmp_path / "later")


def test_each_question_can_be_done_alone(tmp_path):
    """In a copy where nothing else is solved."""
    jobs = []
    for question in CODED:
        make(tmp_path / question, solved=(question,))
        jobs.append(dict(folder=str(tmp_path / question), question=question, seed=2))
    results, ended, said = run_jobs(jobs, 120, tmp_path)
    assert [points(result) for result in results] == [
        QUESTIONS[question].points for question in CODED
    ], f"{ended}\n{said}"


def test_the_untouched_copy_fails_every_question_with_its_hint(copy):
    jobs = [dict(folder=str(copy), question=question, seed=1) for question in QUESTIONS]
    results, ended, said = run_jobs(jobs, 120, copy.parent)
    assert len(results) == len(jobs), f"{ended}\n{said}"
    for question, result in zip(QUESTIONS, results):
        assert result["tests"] and points(result) == 0 and not result["broken"]
        for test in result["tests"]:
            assert test["reason"].startswith(f"NotImplementedError: {question}: "), test


def test_what_is_not_asked_for_works_in_the_copy(copy):
    """All of the copy's own tests: those that need no answer pass, and nothing fails but for an answer that is still open."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        "--junitxml=../junit.xml",
    ]
    subprocess.run(
        command, cwd=copy, capture_output=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    cases = ElementTree.parse(copy.parent / "junit.xml").findall(".//testcase")
    failures = [
        case.find(kind)
        for case in cases
        for kind in ("failure", "error")
        if case.find(kind) is not None
    ]
    assert len(cases) > 100 and len(cases) - len(failures) > 40
    for failure in failures:
        assert re.search(r"NotImplementedError: q\d: ", failure.get("message") + failure.text), (
            failure.text
        )


# ==================================================================================================== the grader
def submit(folder, **files):
    folder.mkdir()
    for name in {file for question in CODED for file in QUESTIONS[question].files}:
        (folder / name).write_text(REFERENCE[name])
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.write_text(text) if text is not None else path.unlink()
    return folder


def outcome(results):
    return {f"q{test['number']}": (test["score"], test["output"]) for test in results["tests"]}


@pytest.mark.slow
def test_the_command_gives_the_reference_full_marks(tmp_path):
    """As an instructor runs it, the training of q6 included."""
    submission = submit(tmp_path / "reference")
    for path in homework.SOLUTIONS.iterdir():
        shutil.copy(path, submission)
    results = grade(submission, {name: question.seconds for name, question in QUESTIONS.items()})
    assert [test["score"] for test in results["tests"]] == [
        question.points for question in QUESTIONS.values()
    ], results
    assert {test["status"] for test in results["tests"]} == {"passed"}


def test_results_in_gradescopes_format(tmp_path, capsys):
    """The command, on a folder with nothing in it."""
    (tmp_path / "empty").mkdir()
    assert (
        homework.main(
            ["grade", str(tmp_path / "empty"), "--results", str(tmp_path / "results.json")]
        )
        == 0
    )
    results, shown = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    assert (
        results["score"] == 0
        and results["visibility"] == "visible"
        and isinstance(results["output"], str)
    )
    assert [test["number"] for test in results["tests"]] == [name[1:] for name in QUESTIONS]
    for test, (name, question) in zip(results["tests"], QUESTIONS.items()):
        assert (
            test["score"] == 0
            and test["max_score"] == question.points
            and test["status"] == "failed"
            and test["name"] == f"{name}: {question.about}"
        )
        assert (
            f"{question.files[0]} is missing" in test["output"]
            and test["name"] in shown
            and question.files[0] in shown
        )
    with pytest.raises(SystemExit, match="no folder"):
        homework.main(["grade", str(tmp_path / "nowhere")])


def test_a_submission_that_hangs_leaves_floods_or_does_not_parse(tmp_path):
    cosd = changed("cosd.py", "    a = log_a.exp()\n", "    while True: pass\n")  # q1 hangs
    cosd = cosd.replace("    scored[:, :skip] = 0\n", "    import os; os._exit(0)\n")  # q2 leaves
    cosd = cosd.replace(
        "        loss, h = (weights * d).sum(), entropy(student_logits)",
        "        print('x' * 10**8)\n        loss, h = (weights * d).sum(), entropy(student_logits)",
    )  # q5 floods
    submission = submit(
        tmp_path / "submission",
        cosd=cosd,
        model=None,
        contexts=REFERENCE["contexts.py"].replace("def fill(", "def fill((", 1),
    )
    found = outcome(grade(submission, dict.fromkeys(CODED, 60) | {"q1": 4}))
    line = (
        REFERENCE["contexts.py"]
        .splitlines()
        .index(next(t for t in REFERENCE["contexts.py"].splitlines() if t.startswith("def fill(")))
        + 1
    )
    assert found["q1"][0] == 0 and "longer than 4 seconds" in found["q1"][1]
    assert found["q2"][0] == 0 and "exit code 0" in found["q2"][1]
    assert found["q3"] == (0, "model.py is missing: see q3 in homework.md")
    assert found["q4"][0] == 0 and f"contexts.py does not parse: line {line}" in found["q4"][1]
    assert found["q5"][0] < 15 and len(found["q5"][1]) < 10_000


FORGED = """
import atexit, json, os, sys

def forge():
    line = json.dumps({"tests": [{"name": "all", "points": 15, "passed": True, "reason": ""}], "broken": None, "status": 0})
    print(line, flush=True)
    for name in os.listdir("."):
        if os.path.isfile(name):
            open(name, "w").write(line)
    os._exit(0)

"""


def test_a_submission_that_forges_raises_or_spoils(tmp_path):
    """Results printed or written about, an error at import, patched test functions, `sys.exit`, `pytest.skip`."""
    cosd = changed("cosd.py", "    scored[:, :skip] = 0\n", "    forge()\n").replace(
        "import math\n", "import math\n" + FORGED, 1
    )  # q2
    cosd = cosd.replace(
        "    return kl(log_p, log_q)", "    import pytest; pytest.skip('later')"
    )  # q1
    cosd = cosd.replace(
        "        loss, h = (weights * d).sum(), entropy(student_logits)", "        sys.exit(0)"
    )  # q5
    model = changed(
        "model.py",
        "            self.keys[layer][rows, :, slots]",
        "            del torch.Tensor.transpose\n            self.keys[layer][rows, :, slots]",
    )
    contexts = "BROKEN = 1 / 0\n" + REFERENCE["contexts.py"]
    found = outcome(
        grade(
            submit(tmp_path / "submission", cosd=cosd, model=model, contexts=contexts),
            dict.fromkeys(CODED, 60),
        )
    )
    assert 0 < found["q1"][0] < 15 and "later" in found["q1"][1]
    assert found["q2"][0] == 0 and "ended by itself" in found["q2"][1]
    assert found["q3"][0] < 15
    assert found["q4"][0] == 0 and "ZeroDivisionError" in found["q4"][1]
    assert found["q5"][0] < 15 and "SystemExit" in found["q5"][1]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"x = (\n", "does not parse: line 1"),
        (b"x = '\0'", "does not parse"),
        (b"(" * 5000, "does not parse"),
        (b"", "no function"),
        (b"def render(): pass\n" * 400_000, "larger than 4 MB"),
    ],
)
def test_rubbish_is_refused_in_a_line(data, reason, tmp_path):
    (tmp_path / "contexts.py").write_bytes(data)
    found = outcome(grade(tmp_path, {"q4": 60}))
    assert (
        found["q4"][0] == 0 and reason in found["q4"][1] and len(found["q4"][1].splitlines()) == 1
    )


def test_links_and_folders_are_no_files(tmp_path):
    (tmp_path / "contexts.py").symlink_to(ROOT / "contexts.py")
    (tmp_path / "model.py").mkdir()
    found = outcome(grade(tmp_path, {"q3": 60, "q4": 60}))
    assert found["q3"] == (0, "model.py is not a plain file") and found["q4"] == (
        0,
        "contexts.py is not a plain file",
    )


def test_what_a_student_adds_comes_along():
    """Helpers, constants, imports (a longer line of the file's own, one that may fail), methods, other indentation, line ends."""
    reference = "from __future__ import annotations\nimport torch\n\n\nclass A:\n    def f(self):\n        return 0\n\n\ndef g():\n    return 0\n\n\nlast = 1\n"
    submitted = (
        "from __future__ import annotations\nimport torch, math\ntry:\n    import einops\nexcept ImportError:\n    einops = None\n\nprint(1)\nTAU = 2\n\n"
        "class A:\n\t@property\n\tdef f(self):\n\t\treturn self.h() + TAU\n\tdef h(self):\n\t\treturn helper()\n\n"
        "def g():\n    raise ValueError\n\ndef helper():\n    return math.floor(40.5)\n\nif __name__ == '__main__':\n    g()\n"
    ).replace("\n", "\r\n")
    merged = merge(reference, *parse("a.py", submitted.encode()), ["A.f"], "a.py")
    names = {}
    exec(merged, names)
    assert (
        names["A"]().f == 42
        and names["g"]() == 0
        and names["last"] == 1
        and "print" not in merged
        and "einops" in names
    )


# q6 to q8: what is handed in as a file
RUNS = [
    dict(divergence=d, teacher=t, anchors=a, score=1.0, prior=0.0, drift=0.1)
    for d in ("jsd", "forward_kl")
    for t in ("ema", "live")
    for a in (0, 0.5)
]
EXCHANGE = (homework.SOLUTIONS / "q8.py").read_text()
WRONG_FILES = [
    ("q6", "q6.json", "too many steps", '{"steps": 251}'),
    ("q6", "q6.json", "too large a batch", '{"batch": 65}'),
    ("q6", "q6.json", "a field that is not to be set", '{"pretrain_steps": 1}'),
    ("q6", "q6.json", "another place", '{"out": "/"}'),
    ("q6", "q6.json", "no JSON", "{steps: 100}"),
    ("q6", "q6.json", "no object", "[]"),
    ("q6", "q6.json", "no such method", '{"method": "dpo"}'),
    ("q6", "q6.json", "the base", '{"method": "pretrain"}'),
    ("q6", "q6.json", "a number in quotes", '{"steps": "100"}'),
    ("q6", "q6.json", "a learning rate out of range", '{"lr": -1}'),
    ("q7", "q7.json", "seven runs", json.dumps(RUNS[:7])),
    ("q7", "q7.json", "eight times the same", json.dumps(RUNS[:1] * 8)),
    ("q7", "q7.json", "a score of 3", json.dumps([*RUNS[:7], RUNS[7] | {"score": 3}])),
    ("q7", "q7.json", "NaN", json.dumps([*RUNS[:7], RUNS[7] | {"drift": float("nan")}])),
    ("q7", "q7.json", "an object", "{}"),
    ("q7", "q7.png", "no picture", "hello"),
    ("q7", "q7.md", "two words", "it works"),
    (
        "q8",
        "q8.py",
        "the context in the prompt",
        EXCHANGE.replace('f"{count} {coin}"', 'f"one {coin} is {worth} {count} {coin}"'),
    ),
    (
        "q8",
        "q8.py",
        "the answer in the prompt",
        EXCHANGE.replace('f"{count} {coin}"', 'f"{count} {coin} {answer}"'),
    ),
    (
        "q8",
        "q8.py",
        "a random state of its own",
        EXCHANGE.replace("rng.randint(2, 9), rng", "__import__('random').randint(2, 9), rng"),
    ),
    (
        "q8",
        "q8.py",
        "always the same",
        EXCHANGE.replace("draw_word(rng, heldout)", "'mot'").replace("rng.randint(2, 9)", "3"),
    ),
    (
        "q8",
        "q8.py",
        "held-out words leak",
        EXCHANGE.replace("draw_word(rng, heldout)", "draw_word(rng)"),
    ),
    (
        "q8",
        "q8.py",
        "the context decides nothing",
        EXCHANGE.replace("count * worth", "count * len(coin)"),
    ),
    ("q8", "q8.py", "no description", EXCHANGE.replace("DESCRIPTION = ", "DESCRIPTION = '' and ")),
    (
        "q8",
        "q8.py",
        "an empty answer",
        EXCHANGE.replace("str(count * worth), f", "'', f"),
    ),
    ("q8", "q8.py", "a kind that exists", EXCHANGE.replace('"exchange"', '"privileged"')),
    ("q8", "q8.py", "no record", EXCHANGE.replace("KIND = Kind(", "KIND = dict(")),
    ("q8", "q8.py", "never drawn in pretraining", EXCHANGE.replace("share=0.2", "share=0.0")),
    ("q8", "q8.py", "not Python", "def draw(:"),
]


def test_files_handed_in(tmp_path):
    """Wrong ones lose points, and say why; a bad q6.json is not trained on."""
    jobs = []
    for number, (question, file, _, text) in enumerate(
        [*WRONG_FILES, ("q7", "q7.md", "", None), ("q8", "q8.py", "", None)]
    ):
        submission, project = tmp_path / f"submission{number}", tmp_path / f"project{number}"
        shutil.copytree(homework.SOLUTIONS, submission), project.mkdir()
        if text is not None:
            (submission / file).write_text(text)
        build(submission, question, project)
        jobs.append(dict(folder=str(project), question=question, seed=number))
    results, ended, said = run_jobs(jobs, 100, tmp_path)
    assert len(results) == len(jobs), f"{ended}\n{said}"
    assert [points(result) for result in results[-2:]] == [
        QUESTIONS["q7"].points,
        QUESTIONS["q8"].points,
    ]
    for (question, _, what, _), result in zip(WRONG_FILES, results):
        assert points(result) < QUESTIONS[question].points and (
            points(result) == 0 or question != "q6"
        ), what
        assert any(test["reason"] for test in result["tests"]), what


def test_only_what_may_be_edited_is_taken(tmp_path):
    """Tests, conftest, pytest's settings, given functions and other files of the submission play no part."""
    submission = submit(
        tmp_path / "submission",
        contexts=REFERENCE["contexts.py"]
        .replace("def encode(", "def encode_(")
        .replace("return ENCODING", "return []; ENCODING"),
    )
    (submission / "tests").mkdir()
    for name in (
        "conftest.py",
        "tests/conftest.py",
        "tests/test_questions.py",
        "sitecustomize.py",
        "pytest.py",
    ):
        (submission / name).write_text("raise SystemExit")
    (submission / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--co'")
    assert outcome(grade(submission, {"q4": 60}))["q4"][0] == 10
