//! What the tests share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A path below `../shared`, the workshop's oracles. `None`, with a message, where they are absent.
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not here", path.display());
    None
}

/// A path below `fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// Runs the `prefold` command in `folder`.
pub fn prefold(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
    command.current_dir(folder).args(args).env_remove("ORT_DYLIB_PATH").env("NO_COLOR", "1").output().unwrap()
}

/// Runs the `prefold` command and expects it to succeed; returns what it printed.
pub fn prefold_ok(folder: &Path, args: &[&str]) -> String {
    let output = prefold(folder, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "prefold {args:?} failed:\n{error}");
    String::from_utf8(output.stdout).unwrap()
}

/// `a` as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
