"""The cache of compiled programs: where it is, what there is without one, and that it is used."""

import contextlib
import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import wmjax
from tests.test_run import TINY
from wmjax.cache import enable_compilation_cache


@pytest.fixture
def unset(monkeypatch):
    """JAX and the environment as they are where nobody has said anything about a cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    for name in ("WMJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_folder_is_of_the_variable_or_below_the_user_s_cache_or_home(unset, tmp_path):
    unset.setenv("HOME", str(tmp_path / "home"))
    for name, value, folder in (
        ("HOME", "home", "home/.cache/wmjax/xla"),
        ("XDG_CACHE_HOME", "cache", "cache/wmjax/xla"),
        ("WMJAX_CACHE", "mine", "mine"),
    ):
        unset.setenv(name, str(tmp_path / value))
        jax.config.update("jax_compilation_cache_dir", None)
        assert enable_compilation_cache(pytest.fail) == tmp_path / folder
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / folder)
    unset.setenv("WMJAX_CACHE", "~/other")
    assert enable_compilation_cache(pytest.fail) == tmp_path / "mine"  # JAX's own setting comes first
    jax.config.update("jax_compilation_cache_dir", None)
    assert enable_compilation_cache(pytest.fail) == tmp_path / "home" / "other"


@pytest.mark.parametrize("value", ["off", "OFF", "0", "none"])
def test_it_can_be_turned_off(unset, value):
    unset.setenv("WMJAX_CACHE", value)
    assert enable_compilation_cache(pytest.fail) is None
    assert jax.config.jax_compilation_cache_dir is None


def test_jax_s_own_switch_holds(unset, tmp_path):
    unset.setenv("WMJAX_CACHE", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert enable_compilation_cache(pytest.fail) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("cache", ["~nouser/x", "{file}", "{file}/below", "/proc/below", "{long}", "home"])
def test_where_there_can_be_none_one_line_says_so(unset, tmp_path, cache):
    (tmp_path / "file").write_text("text")
    if cache == "home":  # neither HOME nor an entry of the user
        unset.delenv("HOME", raising=False)
        unset.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    else:
        unset.setenv("WMJAX_CACHE", cache.format(file=tmp_path / "file", long="/tmp/" + 300 * "x"))
    said = []
    assert enable_compilation_cache(said.append) is None
    assert jax.config.jax_compilation_cache_dir is None
    assert len(said) == 1 and said[0].startswith("no compilation cache: ") and "\n" not in said[0]
    assert "WMJAX_CACHE names another folder" in said[0]


def test_a_folder_that_cannot_be_written_is_none(unset, tmp_path):
    unset.setenv("WMJAX_CACHE", str(tmp_path))
    unset.setattr("tempfile.TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    said = []
    assert enable_compilation_cache(said.append) is None
    assert f"{str(tmp_path)!r} cannot be used (Read-only file system)" in said[0]


def test_an_import_alone_turns_nothing_on_and_does_not_start_jax(tmp_path):
    code = "import wmjax, jax; wmjax.train, wmjax.load, wmjax.Run; print(jax.config.jax_compilation_cache_dir)\n"
    code += "import wmjax.cli; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    there = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"HOME": str(tmp_path)}
    there |= {"PYTHONPATH": str(Path(wmjax.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"] and not list(tmp_path.iterdir())


@contextlib.contextmanager
def counted(event):
    """A list that grows with each event of this name that JAX tells."""
    found = []
    listener = lambda name, **more: found.append(name) if name == event else None
    jax.monitoring.register_event_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listener)


@pytest.mark.slow
def test_a_second_run_from_python_compiles_nothing_that_took_long(unset, tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    unset.setenv("WMJAX_CACHE", str(tmp_path / "cache"))
    compilation_cache.reset_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        one = lambda name: wmjax.train(
            "dreamer_v3", "probe:act_obs", steps=40, out=tmp_path / name, progress=False, **TINY
        )
        with counted("/jax/compilation_cache/cache_misses") as first:
            one("first")
        jax.clear_caches()
        with counted("/jax/compilation_cache/cache_misses") as second:
            one("second")
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        compilation_cache.reset_cache()
    assert len(first) > 5 and not second
