//! How much memory this process has used.

/// The largest resident size so far in bytes, pages of mapped files included; none where the system does not tell.
#[cfg(unix)]
#[allow(unsafe_code)] // getrusage: see below
pub(super) fn peak_resident() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is valid for writes of its type; zeros are a valid `rusage`, and it is read only after success.
    let usage = unsafe {
        if libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) != 0 {
            return None;
        }
        usage.assume_init()
    };
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    u64::try_from(usage.ru_maxrss).ok().map(|size| size * unit)
}

/// The largest resident size so far in bytes; none where the system does not tell.
#[cfg(not(unix))]
pub(super) fn peak_resident() -> Option<u64> {
    None
}
