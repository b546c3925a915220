//! What the tests share.

use std::path::PathBuf;

/// A path below `../shared`, the workshop's oracles. `None`, with a message, where they are absent.
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not here", path.display());
    None
}
