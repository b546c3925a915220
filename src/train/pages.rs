//! Pages of memory where gradients are as large as a model.
//!
//! The allocator keeps freed pages for the next step, which is what makes a step fast while gradients are small. Beside large ones
//! the same pages are wanted for something else later in the step: first for activations, then for gradients, in blocks of other
//! sizes.

use std::collections::BTreeMap;

use candle_core::Tensor;

/// Bytes of gradients after which free pages are given back; where all that is trained has fewer, nothing is done.
const LARGE: usize = 1 << 26;

/// Follows a sum of gradients as it grows in a backward pass, and as it is given up.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// Bytes that came or went since pages were given back.
    moved: usize,
}

impl Pages {
    /// Gives free pages back where much has moved since it last did so.
    pub(super) fn moved(&mut self, bytes: usize) {
        self.moved += bytes;
        if self.moved >= LARGE {
            self.moved = 0;
            give_back_free_ones();
        }
    }
}

/// Bytes of gradients.
pub(super) fn bytes(gradients: &BTreeMap<String, Tensor>) -> usize {
    gradients.values().map(|gradient| gradient.elem_count() * gradient.dtype().size_in_bytes()).sum()
}

/// Gives the pages that are free now back to the system, where the program's allocator is mimalloc.
#[allow(unsafe_code)]
fn give_back_free_ones() {
    // SAFETY: it touches nothing that is in use, and may be called by any thread at any time.
    unsafe { libmimalloc_sys::mi_collect(true) }
}

/// Keeps all freed pages for what is allocated next. The allocator would hand pages back that were free for a tenth of a second, which
/// every training step takes again: a quarter of its time went into clearing them. For the start of a program.
pub fn keep_freed_pages() {
    purge_after(-1);
}

/// Prepares the process to train so many parameters, before the model is read: where their gradients are large, free pages can be
/// given back, and the process takes no pages of 2 MiB. These make a step faster by a few hundredths, and hold on to much around
/// blocks of a few.
pub fn prepare_memory(parameters: usize) {
    if parameters.saturating_mul(size_of::<f32>()) < LARGE {
        return;
    }
    // a week: pages would not even be noted as free where it is never
    purge_after(7 * 24 * 3600 * 1000);
    #[cfg(target_os = "linux")]
    #[allow(unsafe_code)]
    // SAFETY: it changes how the system maps pages that are yet to be touched, and nothing that a program can read; where it is
    // refused, nothing changes.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}

/// The milliseconds after which the allocator hands free pages back, −1 for never; `MIMALLOC_PURGE_DELAY` in the environment wins.
fn purge_after(milliseconds: std::ffi::c_long) {
    /// `mi_option_purge_delay` of mimalloc's header.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: the option exists in both lines of mimalloc's, and is read anew whenever a page becomes free.
        #[allow(unsafe_code)]
        unsafe {
            libmimalloc_sys::mi_option_set(PURGE_DELAY, milliseconds);
        }
    }
}
