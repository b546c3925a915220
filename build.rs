//! Tells the crate which versions of its engines it was built with, for reports.

fn main() {
    println!("cargo:rerun-if-changed=Cargo.lock");
    let lock = std::fs::read_to_string("Cargo.lock").unwrap_or_default();
    for (package, variable) in [("candle-core", "CANDLE_VERSION"), ("tract-onnx", "TRACT_VERSION")] {
        println!("cargo:rustc-env={variable}={}", version(&lock, package).unwrap_or("unknown"));
    }
}

/// The version that `Cargo.lock` pins for a package.
fn version<'a>(lock: &'a str, package: &str) -> Option<&'a str> {
    let after = lock.split_once(&format!("name = \"{package}\"\nversion = \""))?.1;
    Some(after.split_once('"')?.0)
}
