"""Where a submission runs: a process that maps inputs to outputs and has no access to anything else.

The grader sends this file, the given code of one question and the submitted file over a pipe; then a few cases at a time come in
as JSON and their outputs go back as JSON. This process has no tests, no expected values and no reference answer to the question.

The cases run in a child process; if one ends it or hangs, the next one gets a new child. Before any submitted code runs in it, the
child has given up the right to open anything, file, socket or pipe (a limit of zero descriptors works on Linux and macOS, for every
user). If the grader is root, the child also has an empty folder as its whole file system, and is a user that owns nothing. Memory
and time are limited. A child's answers are data, which the grader judges elsewhere; processes that it leaves behind are killed.

So everything is imported beforehand, by the names that the grader has read in the submission.
"""

import ctypes
import importlib
import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
import traceback
import types
from dataclasses import asdict, is_dataclass

import torch

LARGEST_OUTPUT = 16 * 2**20  # bytes
OPENED_A_FILE = "there are no files, no network and no imports here except those named in your file"


# ============================================================================================ numbers as plain data
def plain(value):
    """Tensors, dataclasses and containers -> values for JSON."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().double() if value.is_floating_point() else value.detach()
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "values": flat.flatten().tolist(),
        }
    if is_dataclass(value):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def lively(value):
    """The reverse: a dict with a dtype becomes a tensor."""
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "values"}:
        tensor = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
        return tensor.reshape(value["shape"])
    if isinstance(value, dict):
        return {key: lively(inner) for key, inner in value.items()}
    return [lively(inner) for inner in value] if isinstance(value, list) else value


def a_model(config, weights, dtype="float64", adapters=None):
    """The GPT that a case describes, with its weights."""
    model = sys.modules["model"]
    gpt = model.GPT(model.GPTConfig(**config)).to(getattr(torch, dtype))
    if adapters:
        model.add_adapters(gpt, adapters)
    gpt.load_state_dict({name: lively(tensor) for name, tensor in weights.items()}, strict=True)
    return gpt


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Counted:
    """Count the tokens that a model reads meanwhile: rows times positions, over all calls of `hidden`."""

    def __init__(self, model):
        self.model, self.tokens = model, 0

    def __enter__(self):
        def note(_, inputs):
            self.tokens += inputs[0].numel()

        self.hook = self.model.embed.register_forward_pre_hook(note)
        return self

    def __exit__(self, *_):
        self.hook.remove()


# =================================================================================== what a case may ask a file to do
def q1_divergence(theirs, name, student, teacher, more):
    s, t = student.requires_grad_(), teacher.requires_grad_()
    before = s.detach().clone(), t.detach().clone()
    value = getattr(theirs, name)(s, t, **more)
    weights = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    (value * weights).sum().backward()
    same = torch.equal(before[0], s) and torch.equal(before[1], t)
    return {"value": value, "grad": s.grad, "teacher_grad": t.grad, "unchanged": same}


def q1_kl(theirs, log_a, log_b):
    a, b = log_a.requires_grad_(), log_b.requires_grad_()
    value = theirs.kl(a, b)
    value.sum().backward()
    return {"value": value, "grad_a": a.grad, "grad_b": b.grad}


def q1_pair(theirs, student, teacher):
    with torch.autocast("cpu", torch.bfloat16):
        pair = theirs.log_softmax_pair(student.requires_grad_(), teacher.requires_grad_())
    return {"pair": list(pair), "graph": [x.requires_grad for x in pair]}


def q2_states(theirs, gpt, prompts, ids, mask, prefix):
    model = a_model(**gpt)
    before = [list(p) for p in prompts], ids.clone(), mask.clone()
    if prefix:
        cache = model.read(prefix)
        states = theirs.completion_states(model, prompts, ids, mask, cache)
    else:
        states = theirs.completion_states(model, prompts, ids, mask)
    weights = torch.arange(1, states.numel() + 1, dtype=states.dtype).reshape(states.shape)
    if states.requires_grad:
        (states * weights.cos()).sum().backward()
    same = before[0] == prompts and torch.equal(before[1], ids) and torch.equal(before[2], mask)
    return {"states": states, "gradients": gradients(model), "unchanged": same}


def q2_weights(theirs, mask, reduction, skip):
    weights = theirs.token_weights(mask, reduction, skip)
    return {"weights": weights, "mask": mask}


def q3_read(theirs, gpt, ids, pieces, room):
    model = a_model(**gpt)
    cache = theirs.KVCache(model.config, room)
    with torch.no_grad():
        logits = [model(part, cache) for part in ids.split(pieces, dim=1)]
    return {"logits": torch.cat(logits, dim=1)}


def q3_through(theirs, gpt, prefix, ids):
    """Gradient of what rows read after a prefix, through both."""
    model = a_model(**gpt)
    cache = theirs.KVCache(model.config, prefix=model.read(prefix))
    logits = model(ids, cache)
    logits.square().sum().backward()
    return {"logits": logits, "gradients": gradients(model)}


def q3_generate(theirs, gpt, prompts, how, seed, prefix, times, autocast):
    model, runs = a_model(**gpt), []
    how = how | ({"eos": set(how["eos"])} if "eos" in how else {})
    cache = model.read(prefix) if prefix else None
    given = json.dumps(prompts)
    for _ in range(times):
        generator, before = torch.Generator().manual_seed(seed), torch.get_rng_state()
        started = generator.get_state()
        with Counted(model) as count, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ids, mask = model.generate(prompts, generator=generator, prefix=cache, **how)
        runs.append(
            {
                "ids": ids,
                "mask": mask,
                "read": count.tokens,
                "moved": not torch.equal(started, generator.get_state()),
                "global": torch.equal(before, torch.get_rng_state()),
                "graph": ids.requires_grad,
            }
        )
    return {"runs": runs, "unchanged": json.dumps(prompts) == given}


def q4_render(theirs, context, prompt):
    return theirs.render(context, prompt)


def q4_dressed(theirs, template, row, attempt):
    before = json.dumps(row)
    turns = theirs.dressed(template, row, attempt)
    return {"turns": turns, "unchanged": json.dumps(row) == before}


def q4_example(theirs, kind, context, template, row, shots):
    before = json.dumps([context, row, shots])
    example = theirs.file_example(kind, context, template, row, shots)
    return {"example": example, "unchanged": json.dumps([context, row, shots]) == before}


def an_objective(theirs, name, seen):
    """Objectives beyond question 1; each differs from the others, and from itself with student and teacher swapped."""

    def apart(s, t, tokens):
        return ((s - 2 * t) ** 2).sum(-1)

    def leaning(s, t, tokens):
        return (t.exp() * (t - s.log_softmax(-1))).sum(-1)

    def tilted(s, t, tokens):
        return s.gather(-1, tokens[:, None])[:, 0] * t.square().sum(-1)

    own = {"apart": apart, "leaning": leaning, "tilted": tilted}
    objective = own[name] if name in own else getattr(theirs, name)

    def counted(s, t, tokens):
        seen.append(len(tokens))
        return objective(s, t, tokens)

    return counted


def q5_rows(theirs, student, given):
    seen, scorer = [], None
    if given["scorer"]:
        source, kind = given["scorer"]
        model = student if source == "student" else a_model(**source)

        class Asked(theirs.Teacher):
            calls = 0

            def states(self, *args, **more):
                Asked.calls += 1
                return super().states(*args, **more)

        scorer = Asked(model, kind, shared=given["shared"])
        if not given["adapters"]:  # where there are, base and student share their weights
            for parameter in scorer.model.parameters():
                parameter.requires_grad_()
        if given["moved"]:  # the student has learned something since
            student.load_state_dict(given["moved"])
    objective = an_objective(theirs, given["objective"], seen)
    names = ("prompts", "scorer_prompts", "ids", "mask", "weights")
    return theirs.Rows(*(given[name] for name in names), scorer, objective), seen


def q5_loss(theirs, student, rows, chunk, times, split):
    student, adapted = a_model(**student), rows["adapters"]
    rows, seen = q5_rows(theirs, student, rows)
    before = [x.clone() for x in (rows.ids, rows.mask, rows.weights)]
    scorer, parts = rows.scorer, rows.split(split)
    for parameter in scorer.model.parameters() if scorer else ():
        parameter.grad = None
    losses, logs, early = [], [], []
    reader = scorer.model if scorer else student
    with Counted(reader) as count:
        for part in parts * times:
            loss, log = theirs.cosd_loss(student, part, chunk)
            early.append(bool(gradients(student)))
            losses.append(loss)
            logs.append(log)
    sum(losses).backward()
    other = scorer and scorer.model is not student and not adapted
    return {
        "losses": losses,
        "logs": logs,
        "log_graph": any(v.requires_grad for log in logs for v in log.values()),
        "gradients": gradients(student),
        "teacher": gradients(scorer.model) if other else {},
        "early": any(early),
        "seen": seen,
        "read": count.tokens,
        "asked": type(scorer).calls if scorer else 0,
        "unchanged": all(map(torch.equal, before, (rows.ids, rows.mask, rows.weights))),
    }


def q5_probabilities(theirs, student, rows):
    student = a_model(**student)
    rows, _ = q5_rows(theirs, student, rows)
    found = theirs.token_probabilities(student, rows)
    graph = any(x.requires_grad for x in found)
    return {"student": found[0], "scorer": found[1], "graph": graph}


def q8_draw(theirs, seeds, heldout, task):
    kind, drawn = theirs.KIND, []
    for seed in seeds:
        given = dict(kind.task) if task else {}
        drawn.append(kind.draw(random.Random(seed), heldout, **given))
    return {
        "kind": {name: getattr(kind, name) for name in ("letter", "share", "drop", "task")},
        "is_kind": type(kind).__name__,
        "description": getattr(theirs, "DESCRIPTION", ""),
        "examples": drawn,
    }


def q8_grade(theirs, examples, texts):
    made = [sys.modules["contexts"].Example(**e) for e in examples]
    return [theirs.KIND.grade(e, text) for e, text in zip(made, texts)]


def sealed(_):
    """Everything that can be opened after all."""
    opened = []
    for name in ("/", "/proc/self/mem", "/etc/hostname", sys.executable):
        try:
            os.close(os.open(name, os.O_RDONLY))
            opened.append(name)
        except OSError:
            pass
    return {"opened": opened}


OPERATIONS = {name: f for name, f in list(globals().items()) if re.match(r"q\d_|sealed$", name)}


# ==================================================================================== the child: sealed, then it runs
def seal(uid, megabytes, seconds):
    """Give up, permanently, every right that a mapping from inputs to outputs does not need."""
    if uid is not None:
        try:  # no network; in a container that may need more rights than root has
            ctypes.CDLL(None).unshare(0x40000000)
        except AttributeError:
            pass
        os.chroot(EMPTY)
        os.chdir("/")
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_AS, TAKEN + megabytes * 2**20),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays open; nothing new will
    ):
        try:
            resource.setrlimit(limit, (most, most))
        except (ValueError, OSError):  # macOS has no limit on the address space
            if limit != resource.RLIMIT_AS:
                raise


def run_cases(order, cases, pipe):
    """Runs in the child. Writes a line of JSON for each case into the pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.dup2(pipe, 3)
    os.closerange(4, 1024)
    sys.path.clear()
    sys.meta_path = sys.meta_path[:2]  # built in and frozen
    seal(order["uid"], order["megabytes"], order["seconds"] * len(cases))
    theirs = types.ModuleType(order["module"])
    sys.modules[order["module"]] = theirs
    broken = None
    try:
        exec(CODE[0], theirs.__dict__)
        for name, standin in order["standins"].items():
            setattr(theirs, name, STANDINS[standin])
    except BaseException as error:
        broken = error
    for case in cases:
        try:
            if broken:
                raise broken
            given = {name: lively(value) for name, value in case["given"].items()}
            text = json.dumps({"out": plain(OPERATIONS[case["operation"]](theirs, **given))})
        except BaseException as error:
            text = json.dumps({"error": described(error)})
        data = text.encode() + b"\n"
        while data:
            data = data[os.write(3, data) :]
    os._exit(0)


def described(error):
    if isinstance(error, OSError) and error.errno in (1, 2, 13, 24):
        return f"{type(error).__name__}: {OPENED_A_FILE} ({error.strerror})"
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<submission>":
            place = f" (line {line} of your file, in {frame.f_code.co_name})"
    return f"{type(error).__name__}: {str(error)[:400]}{place}"


# ====================================================================================== the parent: trusted, it waits
def read_frame(source):
    head = source.readline()
    return json.loads(source.read(int(head))) if head else None


def write_frame(sink, value):
    data = json.dumps(value).encode()
    sink.write(b"%d\n" % len(data) + data)
    sink.flush()


def wait_for(child, pipe, seconds, count):
    """-> (the lines from the pipe, why there are no more). Each line may take `seconds`."""
    data, lines, until = b"", [], time.monotonic() + seconds
    while len(lines) < count:
        left = until - time.monotonic()
        if left <= 0:
            return lines, f"it took longer than {seconds:g} seconds"
        ready, _, _ = select.select([pipe], [], [], min(left, 0.2))
        part = os.read(pipe, 2**20) if ready else b""
        if part:
            data += part
            *new, data = data.split(b"\n")
            lines += [line.decode("utf-8", "replace") for line in new]
            until = time.monotonic() + seconds if new else until
            if len(data) > LARGEST_OUTPUT:
                return lines, "its output is too large"
            continue
        done, status = os.waitpid(child, os.WNOHANG)
        if done and os.WIFSIGNALED(status):
            return lines, f"it was ended by signal {os.WTERMSIG(status)}"
        if done:
            return lines, f"it left with exit code {os.WEXITSTATUS(status)}"
        if ready:  # the pipe is closed, and it goes on
            time.sleep(0.005)
    return lines[:count], ""


def clean_up(child):
    """End the case's process and everything that it has started; where the system allows it, also detached processes."""
    for end in (os.killpg, os.kill):
        try:
            end(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    for _ in range(50):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = file.read().rpartition(")")[2].split()[1]
            except (OSError, IndexError):
                continue
            if parent == str(os.getpid()):
                os.kill(int(name), signal.SIGKILL)
        time.sleep(0.002)


def answers(order):
    """A line of JSON for each case; it says how the process ended if the case ended it."""
    found, cases = [], order["cases"]
    while len(found) < len(cases):
        left = cases[len(found) :]
        ours, childs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                run_cases(order, left, childs)
            finally:
                os._exit(1)
        os.close(childs)
        lines, ended = wait_for(child, ours, order["seconds"], len(left))
        os.close(ours)
        clean_up(child)
        found += lines + [json.dumps({"error": ended})] * bool(ended)
    return found[: len(cases)]


def import_names(names):
    """Make the submission's imports now, because later no file can be opened."""
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException:
            pass


def rehearse(meta):
    """Do once what cases do, because PyTorch imports and reads some of what it needs only at first use."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(2 * y, y, torch.ones_like(y))
            ctx.save_for_backward(slope)
            return 2 * x

        @staticmethod
        def backward(ctx, upstream):
            return upstream * ctx.saved_tensors[0]

    if meta:  # a teacher is made there first, which takes seconds of imports
        with torch.device("meta"):
            torch.nn.init.normal_(torch.nn.Linear(2, 2).weight)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.ones(1, 1, 8, 8, dtype=dtype, requires_grad=True)
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        Twice.apply((x @ y).log_softmax(-1, dtype=torch.float64)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    torch.einsum("ij,jk->ik", torch.ones(2, 2), torch.ones(2, 2))
    torch.multinomial(torch.ones(3), 1)
    torch.rand(1, generator=torch.Generator().manual_seed(0))
    repr(torch.ones(2, 2))


def what_it_takes(meta):
    """The modules that a rehearsal imports. It runs in a child, because a process cannot be forked after a backward pass."""
    ours, childs = os.pipe()
    if os.fork() == 0:
        before = set(sys.modules)
        rehearse(meta)
        os.write(childs, json.dumps(sorted(set(sys.modules) - before)).encode())
        os._exit(0)
    os.close(childs)
    with os.fdopen(ours) as pipe:
        names = json.loads(pipe.read())
    os.wait()
    return names


def warm_up():
    """Make PyTorch read now what it would read from the system at first use."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.ones(1, 1, 8, 8, dtype=dtype)
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        (x @ x).log_softmax(-1, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))


def main():
    global EMPTY, TAKEN, CODE, STANDINS
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    order = read_frame(source)
    EMPTY, CODE, STANDINS = order["empty"], {}, {}
    sys.meta_path = [f for f in sys.meta_path if "ditable" not in str(f)]  # of `pip install -e`
    sys.path[:] = [p for p in sys.path if not os.path.exists(os.path.join(p, "cosd.py"))]
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(36, 1, 0, 0, 0)  # orphans of a case come to this process, and are ended
        libc.prctl(4, 0, 0, 0, 0)  # nobody may look into it
    torch.set_num_threads(1)
    warm_up()
    needed = order["needed"] or what_it_takes(order["meta"])
    import_names(["numpy", "transformers", "tiktoken", *needed])
    for name, text in order["given"].items():  # the instructor's, with its answers taken out
        module = types.ModuleType(name)
        sys.modules[name] = module
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    exec(compile(order["standins"], "standins", "exec"), names := {})
    STANDINS.update({name: names[name] for name in order["standin_names"]})
    for target, name in order["patches"].items():
        module, owner, attribute = target.split(".")
        setattr(getattr(sys.modules[module], owner), attribute, STANDINS[name])
    del order, names
    write_frame(sink, {"ready": True, "needed": needed})
    while (order := read_frame(source)) is not None:
        if "submission" in order:
            import_names(order["imports"])
            try:
                with open("/proc/self/statm") as file:
                    TAKEN = int(file.read().split()[0]) * resource.getpagesize()
            except OSError:
                TAKEN = 2**40
            CODE.clear()
            try:
                CODE[0] = compile(order["submission"], "<submission>", "exec")
                write_frame(sink, {"ready": True})
            except Exception as error:
                write_frame(sink, {"ready": False, "error": f"{type(error).__name__}: {error}"})
        else:
            write_frame(sink, answers(order))


if __name__ == "__main__":
    main()
