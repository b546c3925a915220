//! How much memory this process uses, and has used.

/// The resident size now in bytes; the largest so far where the system does not tell.
pub(super) fn resident() -> Option<u64> {
    // of Linux: sizes in pages, of the whole and of what is resident
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|sizes| sizes.split(' ').nth(1)?.parse::<u64>().ok());
    pages.map(|pages| pages * page_size()).or_else(peak_resident)
}

#[cfg(unix)]
#[allow(unsafe_code)] // sysconf: see below
fn page_size() -> u64 {
    // SAFETY: sysconf takes a number and gives one.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

#[cfg(not(unix))]
fn page_size() -> u64 {
    4096
}

/// The largest resident size so far in bytes, pages of mapped files included; none where the system does not tell.
pub(super) fn peak_resident() -> Option<u64> {
    // Linux counts in getrusage what a launcher used before it became this program, and here it does not
    let status = std::fs::read_to_string("/proc/self/status").ok();
    let line = status.as_deref().and_then(|status| status.lines().find_map(|line| line.strip_prefix("VmHWM:")));
    let size = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    size.map(|size| size * 1024).or_else(peak_by_usage)
}

#[cfg(unix)]
#[allow(unsafe_code)] // getrusage: see below
fn peak_by_usage() -> Option<u64> {
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

#[cfg(not(unix))]
fn peak_by_usage() -> Option<u64> {
    None
}
