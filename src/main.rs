//! The `prefold` command.

use mimalloc::MiMalloc;

/// Training frees and takes large temporaries at every step; the system's allocator gives their pages back each time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> std::process::ExitCode {
    keep_candle_from_spinning();
    prefold::cli::main()
}

/// candle's pool for elementwise operations waits by spinning, which makes training several times slower wherever another
/// process wants the same cores. Without its workers the matrix products and prefold's own operations still use all cores.
/// `CANDLE_NUM_THREADS` in the environment wins.
fn keep_candle_from_spinning() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: this is the first thing that the process does, while it has one thread.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var(VARIABLE, "1");
        }
    }
}
