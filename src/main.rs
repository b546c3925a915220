//! The `prefold` command.

use mimalloc::MiMalloc;

/// Training frees and takes large temporaries at every step; the system's allocator gives their pages back each time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> std::process::ExitCode {
    end_quietly_when_nobody_reads();
    keep_candle_from_spinning();
    prefold::train::keep_freed_pages();
    prefold::cli::main()
}

/// `prefold … | head` ends like any other command once its reader is gone, and not with a panic.
fn end_quietly_when_nobody_reads() {
    // SAFETY: this is the first thing that the process does; it sets a default disposition and installs no handler.
    #[cfg(unix)]
    #[allow(unsafe_code)]
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// candle's pool for elementwise operations waits by spinning, which makes training several times slower wherever another
/// process wants the same cores. Without its workers the matrix products and prefold's own operations still use all cores.
/// `CANDLE_NUM_THREADS` in the environment wins.
fn keep_candle_from_spinning() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: the process still has one thread.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var(VARIABLE, "1");
        }
    }
}
