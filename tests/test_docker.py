"""What is in docker/, without an engine: syntax, paths, versions, manifests against schemas, and what the scripts do.

``test_cpu_target_in_a_clean_root`` goes through the instructions of the Dockerfile's CPU target in a new Debian. It
needs root and debootstrap, and runs with --slow.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from hashlib import sha256
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
STEPS = DOCKER / "steps"
SCHEMAS = Path(__file__).parent / "schemas"
SCRIPTS = [*sorted(STEPS.glob("*.sh")), DOCKER / "slurm.sbatch"]
KUBERNETES = "1.34"  # whose schema the pods are held to


def run(*command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


def tool(name):
    """A program that the test extra installs beside this Python."""
    return Path(sys.executable).parent / name


def stages():
    """Of each stage of the Dockerfile, its instructions as (word, rest), FROM first."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stage = found[name or "default"] = [(word, image)]
        elif line and word != "ARG":
            stage.append((word, rest))
    return found


def step_scripts(stage):
    """The scripts that a stage runs, as Paths in this tree."""
    return [STEPS / name for word, rest in stage if word == "RUN"
            for name in re.findall(r"/src/docker/steps/(\S+)", rest)]


# -- syntax --------------------------------------------------------------------------------------


def test_dockerfile_is_linted(tmp_path):
    assert run(tool("hadolint"), DOCKER / "Dockerfile").stdout == ""
    faulty = tmp_path / "Dockerfile"
    faulty.write_text((DOCKER / "Dockerfile").read_text("utf-8") + "ENTRYPOINT tini --\n")
    assert "DL3025" in run(tool("hadolint"), faulty).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_linted(script):
    done = run(tool("shellcheck"), script)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK), f"{script.name} is not executable"
    assert "\nset -euo pipefail\n" in script.read_text("utf-8")


def test_shellcheck_finds_faults():
    assert "SC2086" in run(tool("shellcheck"), "-", input="#!/bin/bash\nrm $1\n").stdout


# -- the Dockerfile and what it refers to --------------------------------------------------------


def test_what_is_copied_is_there_and_not_ignored():
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignore  # so that all else has to be named
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for stage in stages().values() for word, rest in stage if word == "COPY" and "--from" not in rest
              for source in rest.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / path).exists() for path in copied)


def test_stages_and_steps():
    found = stages()
    assert list(found) == ["cpu", "build", "gpu", "profile", "default"]
    assert found["default"] == [("FROM", "gpu")]  # what a plain docker build makes
    used = {path for stage in found.values() for path in step_scripts(stage)}
    assert used | {STEPS / "fetch.sh"} == set(STEPS.glob("*.sh"))
    for name in ("cpu", "gpu"):
        assert {("USER", "1000"), ("ENTRYPOINT", '["tini", "--"]'), ("CMD", '["python", "-m", "gpudbn.train"]'),
                ("STOPSIGNAL", "SIGINT")} <= set(found[name])
    assert [rest for word, rest in found["profile"] if word == "USER"][-1] == "1000"
    for word, rest in found["gpu"]:
        if word == "COPY" and "--from=build" in rest:
            _, source, target = rest.split()
            assert source == target
            assert any(source in run for word, run in found["build"] if word == "RUN")


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    pinned = {}
    for line in (STEPS / "constraints.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line.partition(" #")[0])
            pinned[requirement.name] = next(iter(requirement.specifier)).version
    needed = {r.name: r.specifier for r in map(Requirement, [*project["dependencies"], *extras["cuda13"],
                                                             *extras["mpich"]])}
    assert set(needed) == set(pinned) - {"nvidia-cuda-runtime"}
    for name, specifier in needed.items():
        assert specifier.contains(pinned[name]), f"{name} {pinned[name]} against {specifier}"
    # one CUDA: the image's, that of the headers in it, the one whose compiler the tests use, the profiler's
    image = re.search(r"^ARG CUDA=(\d+\.\d+)\.\d+$", (DOCKER / "Dockerfile").read_text("utf-8"), re.MULTILINE)[1]
    tested = next(str(r.specifier) for r in map(Requirement, extras["test"]) if r.name == "nvidia-cuda-nvrtc")
    assert tested == f"=={image}.*"
    assert pinned["nvidia-cuda-runtime"] == f"{image}.*"
    assert f"cuda-nsight-systems-{image.replace('.', '-')})" in (STEPS / "packages.sh").read_text("utf-8")


# -- what the steps do ---------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("curl"), reason="fetch.sh needs curl")
def test_fetch_holds_a_tarball_to_its_checksum(tmp_path):
    (tmp_path / "hello").write_text("world")
    with tarfile.open(tmp_path / "some.tar.xz", "w:xz") as tarball:
        tarball.add(tmp_path / "hello", "some-1.0/hello")
    url, checksum = (tmp_path / "some.tar.xz").as_uri(), sha256((tmp_path / "some.tar.xz").read_bytes()).hexdigest()

    good = run(STEPS / "fetch.sh", url, checksum, tmp_path / "good")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "good" / "hello").read_text() == "world"

    bad = run(STEPS / "fetch.sh", url, checksum[::-1], tmp_path / "bad")
    assert bad.returncode == 1
    assert f"must have the SHA-256 {checksum[::-1]}" in bad.stderr
    assert not (tmp_path / "bad").exists()

    missing = run(STEPS / "fetch.sh", (tmp_path / "none").as_uri(), checksum, tmp_path / "missing")
    assert missing.returncode != 0
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(("script", "arguments", "says"), [
    ("fetch.sh", ["url"], "must have URL SHA256 FOLDER; got 1 arguments"),
    ("packages.sh", ["tpu"], "stage must be build, gpu, cpu or profile; got 'tpu'"),
    ("gpudbn.sh", [], "first argument must be gpu or cpu; got ''"),
])
def test_steps_refuse(script, arguments, says):
    done = run(STEPS / script, *arguments)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.parametrize("script", ["ucx.sh", "openmpi.sh"])
def test_tarballs_have_checksums(script):
    text = (STEPS / script).read_text("utf-8")
    assert re.search(r"^version=\d+\.\d+\.\d+$", text, re.MULTILINE)
    assert re.search(r"^sha256=[0-9a-f]{64} ", text, re.MULTILINE)
    assert "curl" not in text  # nothing comes in but through fetch.sh


# -- manifests -----------------------------------------------------------------------------------


def against(schema, document):
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / schema).read_text("utf-8"))).validate(document)


def compose():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))


def mpijob():
    return yaml.safe_load((DOCKER / "mpijob.yaml").read_text("utf-8"))


def test_compose():
    document = compose()
    against("compose.json", document)
    for name, service in document["services"].items():
        build = service["build"]
        context = (DOCKER / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert build["target"] == name
        assert name in stages()
        assert ("deploy" in service) == (name != "cpu")  # who gets the GPUs
    document["services"]["gpu"]["gpu"] = "all"
    with pytest.raises(jsonschema.ValidationError, match="'gpu' was unexpected"):
        against("compose.json", document)


def validate(document):
    against("mpijob-v2beta1.json", document)
    for name, replica in document["spec"]["mpiReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, **replica["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_mpijob_against_its_schema():
    validate(mpijob())


@pytest.mark.parametrize("change", [
    lambda job: job["spec"].update(slots=2),
    lambda job: job["spec"].update(launcherCreationPolicy="Later"),
    lambda job: job["spec"]["mpiReplicaSpecs"].pop("Worker"),
    lambda job: job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"].update(container=[]),
    lambda job: job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0].update(command="sshd"),
])
def test_mpijob_schemas_find_faults(change):
    document = mpijob()
    change(document)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(document)


def test_mpijob_fits_itself_and_the_image():
    spec = mpijob()["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][name] for name in ("Launcher", "Worker"))
    [started], [container] = (role["template"]["spec"]["containers"] for role in (launcher, worker))
    arguments, gpus = started["args"], container["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["slotsPerWorker"] == gpus
    assert int(arguments[arguments.index("-n") + 1]) == gpus * worker["replicas"]
    assert arguments[arguments.index("--map-by") + 1] == f"ppr:{gpus}:node"
    assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]  # noqa: S108
    # as steps/ssh.sh and steps/user.sh arrange it
    ssh, user = ((STEPS / name).read_text("utf-8") for name in ("ssh.sh", "user.sh"))
    assert f"cat >{container['command'][-1]} <<" in ssh
    assert f"HostKey {spec['sshAuthMountPath']}/id_rsa\n" in ssh
    for role in (launcher, worker):
        assert f"useradd --uid {role['template']['spec']['securityContext']['runAsUser']} " in user


# -- Slurm ---------------------------------------------------------------------------------------


@pytest.fixture
def sbatch(tmp_path):
    """Run slurm.sbatch as a job of 8 tasks on 2 nodes whose mpirun prints its arguments, one a line."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    mpirun.chmod(0o755)

    def sbatch(*arguments, **environ):
        job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
        present = {name: value for name, value in (job | environ).items() if value}
        return run(DOCKER / "slurm.sbatch", *arguments, env=present, cwd=tmp_path)

    return sbatch


def test_slurm_command(sbatch):
    launch = ["-n", "8", "--map-by", "ppr:4:node", "--bind-to", "none"]
    train = ["python", "-m", "gpudbn.train", "--mode", "sync"]
    assert sbatch().stdout.splitlines() == launch + train
    assert sbatch("--out", "a folder").stdout.splitlines() == [*launch, *train, "--out", "a folder"]
    image = ["apptainer", "exec", "--nv", "gpudbn.sif"]
    assert sbatch(GPUDBN_IMAGE="gpudbn.sif").stdout.splitlines() == launch + image + train
    profiled = sbatch(GPUDBN_IMAGE="gpudbn.sif", GPUDBN_NSYS="out").stdout.splitlines()
    assert profiled[: len(launch + image) + 2] == [*launch, *image, "nsys", "profile"]
    assert "--output=out/task-%q{OMPI_COMM_WORLD_RANK}" in profiled
    assert profiled[-len(train):] == train


def test_slurm_needs_slurm(sbatch):
    done = sbatch(SLURM_NTASKS="")
    assert done.returncode != 0
    assert "SLURM_NTASKS" in done.stderr


def test_slurm_gives_each_task_a_gpu():
    text = (DOCKER / "slurm.sbatch").read_text("utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options


# -- documentation -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCKER / "README.md"], ids=["README", "docker/README"])
def test_pages_name_what_is_there(page):
    text = page.read_text("utf-8")
    assert set(re.findall(r"--target (\w+)", text)) <= set(stages())
    for path in re.findall(r"\bdocker/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / path).exists(), path


# -- a clean root --------------------------------------------------------------------------------


class Container:
    """A folder with a Debian in it, in which the instructions of a stage are carried out as Docker would."""

    def __init__(self, root):
        self.root, self.user, self.folder, self.entrypoint, self.command = root, "0", "/", [], []
        self.environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for name in ("resolv.conf", "hosts"):
            shutil.copy(Path("/etc") / name, root / "etc" / name)
        if certificates := os.environ.get("PIP_CERT"):  # of a proxy on the way to PyPI
            shutil.copy(certificates, root / "certificates.crt")
            self.environ["PIP_CERT"] = "/certificates.crt"

    def follow(self, word, rest):
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                inside = self.root / target.lstrip("/") / (Path(source).name if target.endswith("/") else "")
                inside.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, inside)
        elif word == "RUN":
            subprocess.run(["chroot", self.root, *self.cleared(), "sh", "-c", rest], check=True)
        elif word == "ENV":
            for name, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                self.environ[name] = value.replace("$PATH", self.environ["PATH"])
        elif word in {"ENTRYPOINT", "CMD"}:
            setattr(self, {"ENTRYPOINT": "entrypoint", "CMD": "command"}[word], json.loads(rest))
        else:
            setattr(self, {"USER": "user", "WORKDIR": "folder", "STOPSIGNAL": "signal"}[word], rest)

    def cleared(self):
        return ["env", "-i", *(f"{name}={value}" for name, value in self.environ.items())]

    def __call__(self, *command):
        """What ``docker run`` of the command does."""
        return run("chroot", self.root, "setpriv", "--reuid", self.user, "--regid", self.user, "--clear-groups",
                   "--no-new-privs", *self.cleared(), "sh", "-c", 'cd "$0" && exec "$@"', self.folder,
                   *self.entrypoint, *command)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("debootstrap"), reason="needs root and debootstrap")
def test_cpu_target_in_a_clean_root(tmp_path):
    (_, image), *instructions = stages()["cpu"]
    root = tmp_path / "root"
    subprocess.run(["debootstrap", "--variant=minbase", re.fullmatch(r"debian:(\w+)-slim", image)[1], root], check=True)
    container = Container(root)
    for instruction in instructions:
        container.follow(*instruction)
    subprocess.run(["mount", "--rbind", "--make-rslave", "/dev", root / "dev"], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    try:
        short = [*container.command, "--epochs", "1", "--finetune-epochs", "2"]
        for done in (container(*short), container("mpirun", "-n", "3", *short)):
            assert done.returncode == 0, done.stdout + done.stderr
            assert "test error" in done.stdout
        assert container("id", "-un").stdout == "gpudbn\n"
        assert container("touch", "/etc/passwd").returncode != 0
    finally:
        subprocess.run(["umount", "--recursive", root / "dev"], check=True)
        subprocess.run(["umount", root / "proc"], check=True)
