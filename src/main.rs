//! The `prefold` command.

use mimalloc::MiMalloc;

/// Training frees and takes large temporaries at every step; the system's allocator gives their pages back each time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> std::process::ExitCode {
    prefold::cli::main()
}
