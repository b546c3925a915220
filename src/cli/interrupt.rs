//! Ctrl-C. While training the first ends the run after its step, and the second ends the process; every other command ends at once,
//! and leaves nothing behind.
//!
//! One Ctrl-C may arrive twice: from the terminal, and from a program that hands signals on to its child (`timeout`, `npm`).
//! So what comes within [`ONE_PRESS`] of the first counts as the first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use miette::{IntoDiagnostic, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::files;

/// How long a signal counts as the one before.
const ONE_PRESS: Duration = Duration::from_millis(500);

/// Listens for the wish to stop.
#[derive(Clone, Debug, Default)]
pub(super) struct Interrupt {
    asked: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

/// What a shell reports for a process that a signal ended.
const fn exit_code(signal: i32) -> u8 {
    128 + signal as u8
}

impl Interrupt {
    /// Takes over SIGINT (Ctrl-C) and SIGTERM (what schedulers send before they kill) for the rest of the process.
    pub(super) fn listen() -> Result<Self> {
        let interrupt = Self::default();
        let armed = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            let status = i32::from(exit_code(signal));
            flag::register_conditional_shutdown(signal, status, armed.clone()).into_diagnostic()?;
            flag::register_usize(signal, interrupt.signal.clone(), signal as usize).into_diagnostic()?;
            flag::register(signal, interrupt.asked.clone()).into_diagnostic()?;
        }
        let asked = interrupt.asked.clone();
        thread::spawn(move || {
            while !asked.load(Ordering::Relaxed) {
                thread::sleep(ONE_PRESS / 5);
            }
            thread::sleep(ONE_PRESS);
            armed.store(true, Ordering::Relaxed);
        });
        Ok(interrupt)
    }

    /// Whether a signal came.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// The exit code that tells of the signal: 130 for Ctrl-C, 143 for SIGTERM.
    pub(super) fn exit_code(&self) -> u8 {
        exit_code(i32::try_from(self.signal.load(Ordering::Relaxed)).ok().filter(|s| *s > 0).unwrap_or(SIGINT))
    }
}

/// Lets SIGINT and SIGTERM remove what is unfinished before they end the process, as the signals that they are.
///
/// # Errors
/// When the system does not hand the signals over.
#[cfg(unix)]
pub(super) fn leave_nothing_behind() -> Result<()> {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use signal_hook::low_level::{emulate_default_handler, pipe};

    let (mut told, teller) = UnixStream::pair().into_diagnostic()?;
    let came = Arc::new(AtomicUsize::new(0));
    for signal in [SIGINT, SIGTERM] {
        // in this order: who is told asks which it was
        flag::register_usize(signal, came.clone(), signal as usize).into_diagnostic()?;
        pipe::register(signal, teller.try_clone().into_diagnostic()?).into_diagnostic()?;
    }
    let wait = move || {
        if told.read_exact(&mut [0]).is_ok() {
            files::remove_unfinished();
            let signal = i32::try_from(came.load(Ordering::Relaxed)).unwrap_or(SIGTERM);
            if emulate_default_handler(signal).is_err() {
                std::process::exit(exit_code(signal).into());
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait).into_diagnostic()?;
    Ok(())
}

/// Other systems end a process without asking it.
#[cfg(not(unix))]
pub(super) fn leave_nothing_behind() -> Result<()> {
    let _is_not_called_here = files::remove_unfinished;
    Ok(())
}
