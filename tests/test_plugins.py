"""Models and strategies that are not al-pipeline's own: found, trusted, checked, recorded, saved without pickle."""

from __future__ import annotations

import io
import json
import os
import py_compile
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Killed, answer_all, play, small_workspace
from msgspec.structs import replace
from numpy.random import SeedSequence
from own_package import PLUG, install, pip, project, wheel
from test_imports import modules_after
from test_models import corpus
from test_simulation import write_corpus

from al_pipeline.active_learning.batch import next_batch
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.shortlist import Shortlist
from al_pipeline.active_learning.strategies import STRATEGIES, scoring_of
from al_pipeline.cli.app import app
from al_pipeline.errors import AlError, BadInput, BadParams, EngineChanged, UnexpectedChange, UsageError
from al_pipeline.features.tfidf import fit as fit_tfidf
from al_pipeline.files import read_json, sha256_bytes, sha256_tree
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.models.ensembles import draw_heads, sample_proba
from al_pipeline.models.estimators import ESTIMATORS, HEAD, Estimate, Estimator, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.text_model import fit_text_model, load_text_model
from al_pipeline.operations.doctor import examine
from al_pipeline.operations.plugins import check_plugin, doubtful_plugins, plugin_record, trusted_plugins
from al_pipeline.operations.predict import predict, typed_texts
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import Options as TickOptions
from al_pipeline.operations.tick import Runner, call, tick
from al_pipeline.params import Features, PluginKind, PluginName, check_overrides, parse_params, plugins_of
from al_pipeline.plugins import packages, references
from al_pipeline.plugins.contract import check_model, check_strategy
from al_pipeline.plugins.packages import package_of
from al_pipeline.plugins.references import find, find_in, record
from al_pipeline.plugins.storage import dump, restore
from al_pipeline.plugins.use import use
from al_pipeline.simulation.corpus import read_corpus
from al_pipeline.simulation.simulate import Options, simulate, with_features
from al_pipeline.threads import one_thread
from al_pipeline.workspace.layout import STAGES, Layout
from al_pipeline.workspace.trust import accept_contents, template
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytest.importorskip("skops")

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs/how-to/plugins.md").read_text(encoding="utf-8"))
BOOSTING, PROCESS, SPREAD, FARTHEST = BLOCKS
EXAMPLES = {"boosting": BOOSTING, "process": PROCESS}
GIVEN = {"spread:spread": SPREAD, "farthest:farthest": FARTHEST}
CLASSES = ["ham", "news", "spam"]


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test puts into the tables of models and strategies is taken out again."""
    monkeypatch.setattr(references, "_named_by_the_user", set[bytes]())
    models, strategies = dict(ESTIMATORS), dict(STRATEGIES)
    yield
    for table, before in ((ESTIMATORS, models), (STRATEGIES, strategies)):
        for name in table.keys() - before.keys():
            table.pop(name)


def write(root: Path, name: str, source: str) -> Path:
    path = root / f"plugins/{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


def trust(root: Path, *plugins: PluginName) -> None:
    accept_contents(find(plugin, root).claim for plugin in plugins)


def model(name: str) -> PluginName:
    return PluginName("model", name)


def features(rows: int, seed: int = 0) -> tuple[FeatureMatrix, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [CLASSES[row % 3] for row in range(rows)]
    vectors = np.eye(32)[[CLASSES.index(label) for label in labels]] + 0.1 * rng.standard_normal((rows, 32))
    return FeatureMatrix(vectors.astype(np.float32)), labels


# The contract -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [HEAD, *sorted(ESTIMATORS)])
def test_own_models_keep_the_contract(name: str) -> None:
    assert [one for one in check_model(name) if not one.ok] == []


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_own_strategies_keep_the_contract(name: str) -> None:
    assert [one for one in check_strategy(name) if not one.ok] == []


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_example_models_keep_the_contract(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, EXAMPLES[name])
    assert [one for one in check_plugin(f"plugins.{name}:make", "model", tmp_path) if not one.ok] == []


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_the_example_strategies_keep_the_contract(name: str, tmp_path: Path) -> None:
    write(tmp_path, name.partition(":")[0], GIVEN[name])
    assert [one for one in check_plugin(f"plugins.{name}", "strategy", tmp_path) if not one.ok] == []


OWN = """
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression

class Own(BaseEstimator):
    def fit(self, X, y):
        self.inner_ = LogisticRegression().fit(X, y)
        return self
    def predict_proba(self, X):
        return {}
def make():
    return Own()
"""
WRONG_MODELS = {
    "NaN": ("self.inner_.predict_proba(X) * np.nan", "gave NaN or infinite values"),
    "one column": ("self.inner_.predict_proba(X)[:, :1]", "do not sum to 1"),
    "one row": ("self.inner_.predict_proba(X)[:1]", r"gave an array of shape \(1, 3\) for 256 rows"),
    "flat": ("self.inner_.predict_proba(X)[:, 0]", r"gave an array of shape \(256,\)"),
    "raises": ("1 / 0", "predict_proba raised ZeroDivisionError"),
    "order": ("self.inner_.predict_proba(X)[:, ::-1]", "of texts that are easy to separate get their class"),
    "chance": ("np.random.dirichlet(np.ones(3), len(X))", "in the last digits|do not sum|saved|change after another"),
}


@pytest.mark.parametrize("what", sorted(WRONG_MODELS))
def test_the_contract_finds_a_wrong_model(what: str, tmp_path: Path) -> None:
    code, says = WRONG_MODELS[what]
    write(tmp_path, "wrong", OWN.format(code))
    problems = [one.problem for one in check_plugin("plugins.wrong:make", "model", tmp_path) if not one.ok]
    assert problems and any(re.search(says, problem) for problem in problems), problems


def test_the_contract_finds_a_fit_by_chance(tmp_path: Path) -> None:
    source = OWN.format("self.inner_.predict_proba(X)")
    source = source.replace(".fit(X, y)\n", ".fit(X + np.random.standard_normal(X.shape), y)\n")
    write(tmp_path, "wrong", source)
    failed = {one.name for one in check_plugin("plugins.wrong:make", "model", tmp_path) if not one.ok}
    assert "equal seeds give equal bytes" in failed


WRONG_STRATEGIES = {
    "return [0] * k": "none twice",
    "return [len(view.ids)]": "outside 0 to",
    "return None": "returned a NoneType",
    "return list(view.ids)[:k]": "whole numbers",
    "return [0.5]": "whole numbers",
    "view.scores[:] = 0; return range(k)": "read-only",
    "raise KeyError('x')": "the strategy raised KeyError",
    "return np.random.permutation(len(view.ids))[:k]": "two calls differ",
    "seen.append(1); return [(len(seen) + n) % len(view.ids) for n in range(k)]": "two calls differ|earlier ones",
    "return []": "0 different items",
}


@pytest.mark.parametrize("body", sorted(WRONG_STRATEGIES))
def test_the_contract_finds_a_wrong_strategy(body: str, tmp_path: Path) -> None:
    write(tmp_path, "wrong", f"import numpy as np\nseen = []\ndef pick(view, k, seed):\n    {body}\n")
    problems = [one.problem for one in check_plugin("plugins.wrong:pick", "strategy", tmp_path) if not one.ok]
    assert problems and any(re.search(WRONG_STRATEGIES[body], problem) for problem in problems), problems


# Errors -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("al_no_such_package.models:make", "no installed package has the module 'al_no_such_package'"),
        ("os:abort", "no installed package has the module 'os'"),
        ("sklearn.no_such:make", r"there is no module 'sklearn.no_such'"),
        ("sklearn.linear_model:NoSuch", "sklearn.linear_model has no attribute 'NoSuch'"),
        ("sklearn.linear_model:LinearRegression", "without predict_proba"),
        ("sklearn.linear_model:LogisticRegression.__doc__", "is a str; name a function without arguments"),
        ("sklearn.ensemble:VotingClassifier", "the factory raised TypeError"),
        ("plugins.gone:make", "plugins/gone.py is not a file in the workspace"),
        ("plugins.deep.er:make", "a plug-in there is a single file"),
        ("plugins:make", "plugins/NAME.py is not a file"),
        ("plugins.broken:make", "importing plugins.broken raised SyntaxError"),
        ("plugins.raising:make", "importing plugins.raising raised RuntimeError: at import"),
        ("plugins.absent:make", "there is no module 'al_no_such_package'"),
        ("plugins.link:make", "is not a file in the workspace"),
    ],
)
def test_what_cannot_be_used_is_one_clear_sentence(name: str, says: str, tmp_path: Path) -> None:
    write(tmp_path, "broken", "def make(:\n")
    write(tmp_path, "raising", "raise RuntimeError('at import')\n")
    absent = write(tmp_path, "absent", "import al_no_such_package\n")
    (tmp_path / "plugins/link.py").symlink_to(absent)
    with pytest.raises(AlError, match=says) as error:
        check_plugin(name, "model", tmp_path)
        problems = [one.problem for one in check_model(name) if not one.ok]
        raise BadInput(problems[0])
    assert "\n" not in str(error.value)


def test_a_dense_model_says_what_to_do_about_sparse_features(tmp_path: Path) -> None:
    name = "sklearn.gaussian_process:GaussianProcessClassifier"
    trust(tmp_path, model(name))
    use([model(name)], tmp_path)
    texts, _, labels = corpus(30, CLASSES)
    with pytest.raises(BadInput, match=r"takes no sparse matrix.*set features.kind: encoder, or begin a pipeline"):
        fit_text_model(texts, None, labels, CLASSES, kind("tfidf"), fit_tfidf(texts), 7, True, classifier=name)


def test_a_strategy_on_vectors_says_that_it_needs_an_encoder(tmp_path: Path) -> None:
    write(tmp_path, "farthest", FARTHEST)
    plugin = PluginName("strategy", "plugins.farthest:farthest")
    trust(tmp_path, plugin)
    with pytest.raises(BadParams, match=r"select.strategy 'plugins.farthest:farthest' needs features.kind encoder"):
        use([plugin], tmp_path, has_vectors=False)
    use([plugin], tmp_path)


def kind(name: Any) -> Features:
    return Features(kind=name, encoder="-", max_tokens=8, precision="float32")


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("model: head", "model: package.module:make", True),
        ("model: head", "model: plugins.mine:make", True),
        ("model: head", "model: heads", False),
        ("model: head", "model: 'a b:c'", False),
        ("model: head", "model: ../mine:make", False),
        ("model: head", "model: 'mine:'", False),
        ("strategy: auto", "strategy: plugins.mine:pick", True),
        ("strategy: auto", "strategy: autos", False),
    ],
)
def test_params_take_names_of_plugins(key: str, value: str, valid: bool) -> None:
    text = template("params.yaml").replace(f"  {key}", f"  {value}")
    if valid:
        params = parse_params(text)
        assert plugins_of(params.train.model, params.select.strategy)
    else:
        with pytest.raises(BadParams, match="entry point"):
            parse_params(text)


def test_an_entry_point_names_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site/al_plugin_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from sklearn.linear_model import LogisticRegression as make\n")
    info = tmp_path / "site/al_plugin_test-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: al-plugin-test\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text("[al_pipeline.models]\nlogistic = al_plugin_test:make\n")
    (info / "RECORD").write_text("al_plugin_test/__init__.py,sha256=x,1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    params = parse_params(template("params.yaml").replace("  model: head", "  model: logistic"))
    [plugin] = plugins_of(params.train.model)
    found = find(plugin, tmp_path)
    assert (found.module, found.attribute, found.package) == ("al_plugin_test", "make", "al-plugin-test 1.2.3")
    assert [one for one in check_plugin("logistic", "model", tmp_path) if not one.ok] == []


# Installed packages -------------------------------------------------------------------------------------------------
def test_a_file_of_an_installed_package_that_is_edited_by_hand_is_another_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_packages: None
) -> None:
    made = wheel(tmp_path)
    site = install(made, tmp_path / "site", monkeypatch)
    plugins = [model("plug"), PluginName("strategy", f"{PLUG}.picks:pick")]
    trust(tmp_path, *plugins)
    before = record(plugins, tmp_path)
    assert before["plug"] == before[f"{PLUG}.picks:pick"] and before["plug"].startswith("al-plug-test 1.0.0 (")
    use(plugins, tmp_path, {"plugins": before})
    for plugin in plugins:
        elsewhere, here = find_in(site, plugin.name, "al-plug-test"), find(plugin, tmp_path)
        assert elsewhere is not None and (elsewhere.claim, elsewhere.record) == (here.claim, here.record)
    assert find_in(site, "plug-second", "al-plug-test") is None

    def refuse(_: Path) -> str:
        pytest.fail("a file was read again")

    with monkeypatch.context() as patch:
        time.sleep(0.06)  # a file that has just changed is not believed
        assert record(plugins, tmp_path) == before
        patch.setattr(packages, "sha256_file", refuse)
        assert record(plugins, tmp_path) == before

    path = site / PLUG / "picks.py"
    path.write_text(path.read_text().replace("range(k)", "range(k - 1, -1, -1)"))
    after = record(plugins, tmp_path)
    assert after["plug"] != before["plug"] and after["plug"].startswith("al-plug-test 1.0.0 (")
    with pytest.raises(EngineChanged, match=r"was al-plug-test 1.0.0 \(.*, is al-plug-test 1.0.0 \("):
        use(plugins, tmp_path, {"plugins": before})
    for plugin in plugins:
        assert not find(plugin, tmp_path).trusted
        with pytest.raises(UnexpectedChange, match="`al trust` shows it"):
            use([plugin], tmp_path)
            fit_classifier("plug", *features(9), CLASSES, 1, False)
    trust(tmp_path, *plugins)
    use(plugins, tmp_path, {"plugins": after})

    path.unlink()
    assert record(plugins, tmp_path)["plug"] not in (before["plug"], after["plug"]), "a file that is gone counts, too"


def test_one_wheel_has_one_digest_however_it_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_packages: None
) -> None:
    made, found = wheel(tmp_path), set()
    uv = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--offline",
        "--no-deps",
        "--target",
        str(tmp_path / "uv"),
        str(made),
    ]
    subprocess.run(uv, check=True, capture_output=True, timeout=300)
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", tmp_path / "plain", made)
    pip("install", "--no-deps", "--no-index", "--target", tmp_path / "compiled", made)
    for site in ("uv", "plain", "compiled"):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / site))
            package_of.cache_clear()
            assert len(list((tmp_path / site / PLUG).rglob("*.pyc"))) == 3 * (site == "compiled")
            found.add(record([model("plug")], tmp_path)["plug"])
    assert len(found) == 1


@pytest.mark.parametrize("listed", [True, False])
def test_a_package_installed_for_development_is_its_sources(
    listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_packages: None
) -> None:
    """Setuptools lists the modules of such an installation, other builders do not."""
    sources = project(tmp_path / "project")
    pip("install", "--no-deps", "--no-build-isolation", "--prefix", tmp_path / "site", "-e", sources)
    [site] = (tmp_path / "site").glob("lib/python*/site-packages")
    if not listed:
        [info] = site.glob("*.dist-info")
        (info / "top_level.txt").unlink()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(sources / "src"))
    for path in sources.rglob("*.egg-info/*"):
        path.unlink()
    package_of.cache_clear()
    plugin = model("plug")
    trust(tmp_path, plugin)
    before = find(plugin, tmp_path)
    assert before.trusted and before.package == "al-plug-test 1.0.0"
    with (sources / f"src/{PLUG}/models.py").open("a") as file:
        file.write("# changed\n")
    after = find(plugin, tmp_path)
    assert after.digest != before.digest and not after.trusted


def test_a_tick_looks_each_plugin_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "boosting", BOOSTING)
    write(tmp_path, "spread", SPREAD)
    changes = {"model: head": "model: plugins.boosting:make", "strategy: auto": "strategy: plugins.spread:spread"}
    text = template("params.yaml")
    for old, new in changes.items():
        text = text.replace(f"  {old}", f"  {new}")
    params, found, looked = parse_params(text), references.find, []
    trust(tmp_path, *plugins_of(params.train.model, params.select.strategy))

    def count(plugin: PluginName, root: Path) -> references.Reference:
        looked.append(plugin.name)
        return found(plugin, root)

    monkeypatch.setattr(references, "find", count)
    assert trusted_plugins(Layout(tmp_path), params) == plugin_record(Layout(tmp_path), params)
    assert looked == 2 * ["plugins.boosting:make", "plugins.spread:spread"], "once for each of the two"


def test_a_flow_takes_the_strategies_that_params_yaml_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_packages: None
) -> None:
    from al_pipeline.flows import rounds

    al_round = rounds.al_round
    monkeypatch.setattr(rounds, "restrict_umask", lambda: None)
    install(wheel(tmp_path), tmp_path / "site", monkeypatch)
    for name in ("margin", "plug-first", f"{PLUG}.picks:pick", "plugins.spread:spread", None):
        assert al_round.validate_parameters({"strategy": name})["strategy"] == name
        check_overrides(None, name)
    for name in ("margn", "", "../mine:pick"):
        with pytest.raises(UsageError) as error:
            check_overrides(None, name)
        with pytest.raises(UsageError, match=re.escape(str(error.value))):
            al_round.fn(strategy=al_round.validate_parameters({"strategy": name})["strategy"])


# Trust --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plugin_kind", ["model", "strategy"])
def test_nothing_runs_before_it_is_trusted(plugin_kind: PluginKind, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    write(tmp_path, "mine", f"open({str(ran)!r}, 'w').close()\ndef make(view=None, k=1, seed=0): return [0]\n")
    plugin = PluginName(plugin_kind, "plugins.mine:make")
    found = find(plugin, tmp_path)
    assert found.package == "plugins/mine.py" and record([plugin], tmp_path)
    with pytest.raises(UnexpectedChange, match="`al trust` shows it"):
        use([plugin], tmp_path)
        fit_classifier("plugins.mine:make", *features(9), CLASSES, 1, False)
    assert not ran.exists()
    trust(tmp_path, plugin)
    assert find(plugin, tmp_path).trusted
    write(tmp_path, "mine", found.source.decode() + "# changed\n")
    assert not find(plugin, tmp_path).trusted, "trusted with its content"
    write(tmp_path, "other", found.source.decode())
    assert not find(PluginName(plugin_kind, "plugins.other:make"), tmp_path).trusted, "and its name"


def test_bytecode_beside_the_file_is_neither_believed_nor_written(tmp_path: Path) -> None:
    source = "from sklearn.linear_model import LogisticRegression as make\n"
    path = write(tmp_path, "mine", "raise SystemExit('bytecode')\n")
    py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    write(tmp_path, "mine", source)
    before = sorted(tmp_path.rglob("*"))
    assert all(one.ok for one in check_plugin("plugins.mine:make", "model", tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


# Storage ------------------------------------------------------------------------------------------------------------
def digests(root: Path) -> str:
    """What models fitted here are: the examples, and one of an installed package."""
    found = []
    for name in ("plugins.boosting:make", "plugins.process:make", "sklearn.ensemble:RandomForestClassifier"):
        trust(root, model(name))
        use([model(name)], root)
        with one_thread():
            fitted = fit_classifier(name, *features(30), CLASSES, 3, True)
        found.append(f"{name} {sha256_bytes(fitted.arrays['model'].tobytes())} {fitted.temperature}")
    return "\n".join(found)


def test_equal_models_are_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """In this one, and in one that hashes text otherwise and loads the libraries only to fit."""
    pytest.importorskip("sklearn.ensemble")
    for name, source in EXAMPLES.items():
        write(tmp_path, name, source)
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    code = "import sys; sys.path[:0] = sys.argv[2:]; import test_plugins as t; print(t.digests(t.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "tests"), str(ROOT)]
    home = {**os.environ, "AL_HOME": str(tmp_path / "another-home"), "PYTHONHASHSEED": seed}
    (tmp_path / "another-home").mkdir(mode=0o700)
    done = subprocess.run(command, env=home, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == digests(tmp_path).splitlines()


@pytest.mark.parametrize("name", ["plugins.boosting:make", "plugins.process:make"])
def test_calibration_saves_no_fold_and_is_that_of_saved_folds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "boosting", BOOSTING)
    write(tmp_path, "process", PROCESS)
    trust(tmp_path, model(name))
    use([model(name)], tmp_path)
    saved = []

    def counted(*words: Any) -> bytes:
        saved.append(dump(*words))
        return saved[-1]

    monkeypatch.setattr("al_pipeline.plugins.models.dump", counted)
    table, labels = features(30)
    labels = ["spam" if row % 7 == 0 else label for row, label in enumerate(labels)]  # else no fold is ever wrong
    fitted = fit_classifier(name, table, labels, CLASSES, 3, True)
    assert isinstance(fitted, Estimate)
    assert saved == [fitted.arrays["model"].tobytes()]
    ESTIMATORS[name] = Estimator(ESTIMATORS[name].fit, ESTIMATORS[name].predict)
    again = fit_classifier(name, table, labels, CLASSES, 3, True)
    assert isinstance(again, Estimate)
    assert len(saved) > 3, "a model, and one for each fold"
    assert again.temperature == fitted.temperature and again.arrays["model"].tobytes() == saved[0]


def test_what_cannot_be_saved_without_pickle_is_refused(tmp_path: Path) -> None:
    for value in ("lambda: 0", "__import__('threading').Lock()", "__import__('pathlib').Path('x')"):
        source = OWN.format("self.inner_.predict_proba(X)")
        source = source.replace("return self\n", f"self.x_ = {value}; return self\n")
        write(tmp_path, "mine", source)
        plugin = model("plugins.mine:make")
        trust(tmp_path, plugin)
        use([plugin], tmp_path)
        with pytest.raises(BadInput, match="cannot be saved without pickle"):
            fit_classifier(plugin.name, *features(9), CLASSES, 1, False)


def test_a_saved_model_with_other_types_is_not_loaded(tmp_path: Path) -> None:
    """A model file may come from anybody: what it names is neither imported nor called."""
    from sklearn.linear_model import LogisticRegression

    table, labels = features(9)
    reference = find(model("sklearn.linear_model:LogisticRegression"), tmp_path)
    trust(tmp_path, model(reference.name))
    data = dump(LogisticRegression().fit(table.dense, labels), reference)
    for module, name in (("os", "system"), ("sklearn.utils._pprint", "_changed_params"), ("subprocess", "Popen")):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            schema = json.loads(archive.read("schema.json"))
            others = {one: archive.read(one) for one in archive.namelist() if one != "schema.json"}
        schema["__module__"], schema["__class__"] = module, name
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("schema.json", json.dumps(schema))
            for one, content in others.items():
                archive.writestr(one, content)
        with pytest.raises(BadInput, match="was not loaded|cannot be read"):
            restore(out.getvalue(), reference)
    for broken in (b"", b"PK", data[: len(data) // 2]):
        with pytest.raises(BadInput, match="cannot be read"):
            restore(broken, reference)


def test_a_saved_model_of_scikit_learn_needs_no_trust_but_one_of_the_plugin_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import LogisticRegression

    table, labels = features(9)
    write(tmp_path, "mine", OWN.format("self.inner_.predict_proba(X)"))
    reference = find(model("plugins.mine:make"), tmp_path)
    plain = dump(LogisticRegression().fit(table.dense, labels), reference)
    accept_contents([reference.claim])
    from al_pipeline.plugins.models import make

    own = dump(make(reference).fit(table.dense, labels), reference)
    monkeypatch.setenv("AL_HOME", str(tmp_path / "another"))
    restore(plain, reference)
    with pytest.raises(UnexpectedChange, match="not trusted"):
        restore(own, reference)
    (tmp_path / "plugins/mine.py").unlink()
    gone = references.find_for_saved(model("plugins.mine:make"), tmp_path)
    restore(plain, gone)
    with pytest.raises(BadParams, match="is not a file in the workspace"):
        restore(own, gone)


# The engine ---------------------------------------------------------------------------------------------------------
def test_the_record_says_what_a_plugin_is_made_of(tmp_path: Path) -> None:
    write(tmp_path, "mine", "import sklearn, json\ndef make():\n    from scipy import sparse\n")
    plugin = model("plugins.mine:make")
    before = record([plugin], tmp_path)
    assert before.keys() == {"plugins.mine:make", "scikit-learn", "scipy", "skops"}
    assert re.fullmatch(r"plugins/mine.py \([0-9a-f]{12}\)", before["plugins.mine:make"])
    write(tmp_path, "mine", "def make():\n    return None\n")
    after = record([plugin], tmp_path)
    assert after["plugins.mine:make"] != before["plugins.mine:make"]
    trust(tmp_path, plugin)
    use([plugin], tmp_path, {"plugins": after})
    with pytest.raises(EngineChanged, match=r"plugins.mine:make: was plugins/mine.py"):
        use([plugin], tmp_path, {"plugins": before})
    installed = record([model("sklearn.svm:SVC")], tmp_path)["sklearn.svm:SVC"]
    assert re.fullmatch(r"scikit-learn [\d.]+ \([0-9a-f]{12}\)", installed)


# With every strategy ------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_works_with_every_strategy(name: str, tmp_path: Path) -> None:
    """Two rounds of each: score, select, and a model saved and loaded in between."""
    write(tmp_path, name, EXAMPLES[name])
    for own, source in GIVEN.items():
        write(tmp_path, own.partition(":")[0], source)
    named = [model(f"plugins.{name}:make"), *(PluginName("strategy", f"plugins.{own}") for own in GIVEN)]
    trust(tmp_path, *named)
    use(named, tmp_path)
    texts, vectors, labels = corpus(60, CLASSES)
    vectors = np.hstack([vectors, 0.01 * np.random.default_rng(1).normal(size=(60, 24))]).astype(np.float32)
    ids = [f"item-{row:02d}" for row in range(60)]
    known = dict(zip(ids[:12], labels, strict=False))
    fitted = fit_text_model(
        texts[:12], vectors[:12], labels[:12], CLASSES, kind("encoder+tfidf"), fit_tfidf(texts), 7, True,
        classifier=named[0].name,
    )  # fmt: skip
    fitted.save(tmp_path / "model")
    loaded = load_text_model(tmp_path / "model")
    matrix = loaded._head_features(texts, vectors)
    rows = np.arange(12, 60)
    proba = loaded.predict_proba([texts[row] for row in rows], vectors[rows])
    samples = {
        one: sample_proba(
            draw_heads(one, loaded.head, matrix.rows(np.arange(12)), labels[:12], SeedSequence(1), 2), matrix.rows(rows)
        )
        for one in ("committee", "posterior")
    }
    for strategy in STRATEGIES:
        scoring = scoring_of(strategy)
        scores = scoring.function(proba if scoring.samples is None else samples[scoring.samples])
        config = QueryConfig(7, 12, strategy, 6, 0.2, 20)
        open_ids = [ids[row] for row in rows]
        batch, choice = next_batch(
            config, 1, open_ids, Shortlist(open_ids, scores, proba), known, CLASSES,
            lambda wanted: vectors[[ids.index(one) for one in wanted]],
        )  # fmt: skip
        assert choice.strategy == strategy and len({query.item_id for query in batch}) == 6, strategy


# Whole rounds -------------------------------------------------------------------------------------------------------
def played(tmp_path: Path, name: str, strategy: str = "auto") -> tuple[Workspace, SimulatedOracle, dict[str, str]]:
    changes = {"model: head": f"model: plugins.{name}:make", "strategy: auto": f"strategy: {strategy}"}
    workspace, truth = small_workspace(tmp_path, changes=changes)
    write(workspace.layout.root, name, EXAMPLES[name])
    write(workspace.layout.root, "spread", SPREAD)
    return workspace, SimulatedOracle(), truth


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_whole_rounds_with_an_example(name: str, tmp_path: Path) -> None:
    workspace, oracle, truth = played(tmp_path, name, "plugins.spread:spread")
    root, layout = workspace.layout.root, workspace.layout
    with pytest.raises(UnexpectedChange, match="`al trust`"):
        tick(workspace, lambda: oracle)
    assert not layout.engine.exists(), "nothing was begun"
    assert [one.level for one in examine(workspace) if one.check == "plug-ins"] == ["error", "error"]
    accept_contents(doubt.claim for doubt in doubtful_plugins(workspace))
    report = play(workspace, oracle, truth, 2)
    assert 1 in report.published
    assert [one.level for one in examine(open_workspace(root)) if one.check == "plug-ins"] == ["ok"]
    engine = read_json(layout.engine)["plugins"]
    assert {f"plugins.{name}:make", "plugins.spread:spread", "skops"} <= engine.keys()
    assert read_json(layout.record(1))["engine"]["plugins"] == engine
    git = Git(root)
    assert git.show("round-0001", f"plugins/{name}.py") == EXAMPLES[name]
    assert {query["strategy"] for query in map(json.loads, layout.queries.read_text().splitlines())} >= {
        "plugins.spread:spread"
    }
    rows = list(predict(open_workspace(root), typed_texts(["cheap pills"])))
    assert rows[0]["label"] in ("ham", "spam")
    [again] = reproduce(open_workspace(root), [1])
    assert again.difference is None, again.difference


@pytest.mark.slow
def test_a_changed_one_stops_stages_and_ticks_until_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "process"
    workspace, oracle, truth = played(tmp_path, name, "plugins.spread:spread")
    root, layout = workspace.layout.root, workspace.layout
    accept_contents(doubt.claim for doubt in doubtful_plugins(workspace))
    play(workspace, oracle, truth, 1)
    engine = read_json(layout.engine)["plugins"]
    model_before = sha256_tree(layout.model)
    by_hand = [sys.executable, "-m", "dvc", "repro", "train", "--force"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(by_hand, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert sha256_tree(layout.model) == model_before, "`dvc repro` by hand, to the same bytes"

    write(root, name, EXAMPLES[name] + "# changed\n")
    done = subprocess.run(by_hand, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0 and "EngineChanged" in done.stderr + done.stdout
    answer_all(oracle, truth)
    with pytest.raises(UnexpectedChange, match="`al trust`"):
        tick(open_workspace(root), lambda: oracle)
    accept_contents(doubt.claim for doubt in doubtful_plugins(open_workspace(root)))
    tick(open_workspace(root), lambda: oracle)
    assert read_json(layout.engine)["plugins"] != engine, "a changed plug-in trains again"

    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(root), str(clone)], check=True)
    monkeypatch.setenv("AL_HOME", str(tmp_path / "home of another"))
    (tmp_path / "home of another").mkdir(mode=0o700)
    doubts = doubtful_plugins(open_workspace(clone))
    assert [doubt.name for doubt in doubts] == [f"plugins.{name}:make", "plugins.spread:spread"]
    assert doubts[0].lines == [*EXAMPLES[name].splitlines(), "# changed"]


@pytest.mark.slow
def test_an_unfinished_build_takes_no_strategy_that_is_not_trusted(tmp_path: Path) -> None:
    workspace, _ = small_workspace(tmp_path, 30)
    write(workspace.layout.root, "spread", SPREAD)

    def run(name: str, action: Callable[[], Any], /) -> Any:
        if name == "train":
            raise Killed
        return action()

    def go_on(strategy: str, run: Runner = call) -> None:
        options = TickOptions(strategy=strategy)
        tick(open_workspace(workspace.layout.root), SimulatedOracle, run=run, options=options)

    with pytest.raises(Killed):
        go_on("margin", run)
    before = workspace.layout.overrides.read_bytes()
    with pytest.raises(UnexpectedChange, match="plugins.spread:spread.*`al trust`"):
        go_on("plugins.spread:spread")
    assert workspace.layout.overrides.read_bytes() == before, "the build goes on as it was begun"


@pytest.mark.slow
def test_simulations_run_them_in_their_processes(tmp_path: Path) -> None:
    write(tmp_path, "boosting", BOOSTING)
    write(tmp_path, "spread", SPREAD)
    named = [model("plugins.boosting:make"), PluginName("strategy", "plugins.spread:spread")]
    trust(tmp_path, *named)
    texts = read_corpus(write_corpus(tmp_path / "mails.csv"))
    params = with_features(parse_params(template("params.yaml")), "tfidf")
    params = replace(params, train=replace(params.train, model=named[0].name))
    found = []
    for workers in (1, 2):
        options = Options(
            strategies=(named[1].name,), seeds=2, budget=60, batch_size=20, seed_size=20, workers=workers, root=tmp_path
        )
        found.append(simulate(texts, "mails", params, options, tmp_path / f"out-{workers}", None))
    assert found[0].folder.name == found[1].folder.name
    assert found[0].result["metrics"] == found[1].result["metrics"]
    assert named[0].name in read_json(found[0].folder / "settings.json")["plugins"]


def test_without_them_nothing_of_them_is_imported() -> None:
    stages = ", ".join(f"al_pipeline.stages.{name}" for name in STAGES)
    found = modules_after(f"import al_pipeline.operations.tick, al_pipeline.simulation.simulate, {stages}")
    assert "al_pipeline.operations.plugins" in found, "the look itself works"
    assert not [name for name in found if name.startswith(("al_pipeline.plugins", "sklearn", "skops"))]


def test_al_trust_shows_a_plugin_and_al_check_plugin_a_table(
    tmp_path: Path,
) -> None:
    from typer.testing import CliRunner

    workspace, _, _ = played(tmp_path, "boosting")
    root = str(workspace.layout.root)
    run = CliRunner()
    shown = run.invoke(app, ["-C", root, "trust", "--yes"])
    assert shown.exit_code == 0 and "HistGradientBoostingClassifier(max_iter=50" in shown.output, shown.output
    assert "plugins/spread.py" in shown.output, "named by no parameter: a batch could use it"
    assert find(PluginName("strategy", "plugins.spread:spread"), workspace.layout.root).trusted
    assert doubtful_plugins(workspace) == []
    passed = run.invoke(app, ["-C", root, "check-plugin", "plugins.boosting:make", "--json"])
    assert passed.exit_code == 0 and json.loads(passed.stdout)["ok"]
    write(workspace.layout.root, "wrong", "def pick(view, k, seed): return [0] * k\n")
    failed = run.invoke(app, ["-C", root, "check-plugin", "plugins.wrong:pick", "--strategy", "--json"])
    assert failed.exit_code == 2 and not json.loads(failed.stdout)["ok"]
