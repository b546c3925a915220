//! The shared libraries that an execution provider of ONNX Runtime needs: where they are, and loading them.
//!
//! A provider's library names CUDA's among its needs, and the loader looks for these in the system's folders alone. They
//! are as often inside Python's packages or a toolkit, so each is loaded by its path first: the loader takes one that is
//! there already.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::files;

/// Asks Python where the packages of NVIDIA lie, without importing one.
const FIND_PACKAGES: &str = "import sys; sys.path = [p for p in sys.path if p]\n\
     import importlib.util as u\n\
     for n in ('nvidia', 'tensorrt_libs'):\n\
     \x20   s = u.find_spec(n)\n\
     \x20   print('\\n'.join(s.submodule_search_locations or []) if s else '')";

/// Libraries that a provider opens by name only when it needs them.
const OPENED_LATER: [&str; 2] = ["libcudnn.so.9", "libcufft.so.12"];

/// Folders that may hold CUDA's libraries, in the order in which they are looked in: `LD_LIBRARY_PATH`, a toolkit, Python's
/// packages.
pub(super) fn folders() -> Vec<PathBuf> {
    let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let listed = std::env::split_paths(&listed).filter(|path| !path.as_os_str().is_empty());
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let toolkits = toolkits.chain([PathBuf::from("/usr/local/cuda")]);
    let toolkits = toolkits.flat_map(|root| [root.join("lib64"), root.join("targets/x86_64-linux/lib")]);
    let mut all: Vec<PathBuf> = listed.chain(toolkits).chain(packages()).filter(|folder| folder.is_dir()).collect();
    let mut seen = BTreeSet::new();
    all.retain(|folder| seen.insert(folder.clone()));
    all
}

/// `nvidia/*/lib` and `tensorrt_libs` of the Python on the path.
fn packages() -> Vec<PathBuf> {
    // no Python is no error: it is one place less
    let Ok(output) = files::run_python(["-c".as_ref(), FIND_PACKAGES.as_ref()]) else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let roots = text.lines().filter(|line| !line.is_empty()).map(PathBuf::from);
    roots.flat_map(|root| libraries_below(&root)).collect()
}

fn libraries_below(root: &Path) -> Vec<PathBuf> {
    if root.file_name().is_some_and(|name| name == "tensorrt_libs") {
        return vec![root.into()];
    }
    let entries = std::fs::read_dir(root).into_iter().flatten().filter_map(Result::ok);
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path().join("lib")).collect();
    folders.sort();
    folders
}

/// What a shared object names among its needs (`DT_NEEDED`), in order; none of what is no 64-bit little-endian ELF file.
fn needs(bytes: &[u8]) -> Option<Vec<String>> {
    const LOAD: u64 = 1;
    const DYNAMIC: u64 = 2;
    let number = |at: usize, size: usize| -> Option<u64> {
        let bytes = bytes.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let index = |value: u64| usize::try_from(value).ok();
    if bytes.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (index(number(0x20, 8)?)?, index(number(0x36, 2)?)?, index(number(0x38, 2)?)?);
    // kind, offset in the file, address, size in the file
    let headers: Vec<[u64; 4]> = (0..count)
        .map(|header| {
            let at = table.checked_add(header.checked_mul(size)?)?;
            Some([
                number(at, 4)?,
                number(at.checked_add(8)?, 8)?,
                number(at.checked_add(16)?, 8)?,
                number(at.checked_add(32)?, 8)?,
            ])
        })
        .collect::<Option<_>>()?;
    let [_, start, _, length] = *headers.iter().find(|header| header[0] == DYNAMIC)?;
    let entries = (0..index(length)? / 16).map_while(|entry| {
        let at = index(start)?.checked_add(entry * 16)?;
        Some((number(at, 8)?, number(at.checked_add(8)?, 8)?)).filter(|(tag, _)| *tag != 0)
    });
    let entries: Vec<(u64, u64)> = entries.collect();
    let strings = entries.iter().find(|(tag, _)| *tag == 5)?.1;
    let holds =
        |header: &&[u64; 4]| header[0] == LOAD && (header[2]..header[2].saturating_add(header[3])).contains(&strings);
    let [_, offset, address, _] = *headers.iter().find(holds)?;
    let strings = index(offset.checked_add(strings.checked_sub(address)?)?)?;
    let name = |at: u64| {
        let text = bytes.get(strings.checked_add(index(at)?)?..)?;
        let end = text.iter().position(|byte| *byte == 0)?;
        String::from_utf8(text.get(..end)?.to_vec()).ok()
    };
    entries.iter().filter(|(tag, _)| *tag == 1).map(|(_, at)| name(*at)).collect()
}

/// Whether a library is NVIDIA's: others are the system's or stand beside the provider.
fn is_sought(name: &str) -> bool {
    ["libcu", "libnv", "libnccl"].iter().any(|prefix| name.starts_with(prefix))
}

/// Loads what a provider's library needs of NVIDIA's, what these need first. Gives back the names of what is not there.
pub(super) fn preload(library: &Path) -> Vec<String> {
    let (mut state, folders) = (Loading::default(), folders());
    for name in needs_of(library) {
        state.load(&name, &folders);
    }
    let missing = state.missing.clone();
    OPENED_LATER.iter().for_each(|name| state.load(name, &folders));
    missing.into_iter().collect()
}

fn needs_of(library: &Path) -> Vec<String> {
    let needs = files::MappedFile::open(library).ok().and_then(|file| needs(file.bytes()));
    needs.unwrap_or_default().into_iter().filter(|name| is_sought(name)).collect()
}

#[derive(Default)]
struct Loading {
    seen: BTreeSet<String>,
    missing: BTreeSet<String>,
}

impl Loading {
    fn load(&mut self, name: &str, folders: &[PathBuf]) {
        if !self.seen.insert(name.to_owned()) {
            return;
        }
        let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
        let needs = found.as_deref().map(needs_of).unwrap_or_default();
        for need in &needs {
            self.load(need, folders);
        }
        let loaded = match &found {
            Some(path) => open(path.as_os_str()) || open(name.as_ref()),
            None => open(name.as_ref()),
        };
        // of one that lacks another only the other is named
        if !loaded && !needs.iter().any(|need| self.missing.contains(need)) {
            self.missing.insert(name.to_owned());
        }
    }
}

/// Loads a library for the whole process and for ever.
#[cfg(unix)]
#[allow(unsafe_code)] // dlopen: see below
fn open(name: &std::ffi::OsStr) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(name) = std::ffi::CString::new(name.as_bytes()) else { return false };
    // SAFETY: `name` is a string that ends in zero. The library's initialisers run, as they would when the provider's library
    // that names it is loaded a moment later.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
}

#[cfg(not(unix))]
fn open(_: &std::ffi::OsStr) -> bool {
    // elsewhere the loader finds what PATH names
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This program is a shared object too, as the loader sees it.
    #[cfg(all(target_os = "linux", target_pointer_width = "64", target_endian = "little"))]
    #[test]
    fn the_needs_of_a_program_are_read() {
        let own = files::MappedFile::open(&std::env::current_exe().unwrap()).unwrap();
        let needs = needs(own.bytes()).unwrap();
        assert!(needs.iter().any(|name| name.starts_with("libc.so")), "{needs:?}");
    }

    #[test]
    fn what_is_no_such_file_has_no_needs() {
        assert_eq!(needs(b""), None);
        assert_eq!(needs(b"MZ\x90\x00 a program of another system"), None);
        let mut bytes = b"\x7fELF\x02\x01".to_vec();
        for length in 6..200usize {
            bytes.resize(length, 0xFF);
            assert_eq!(needs(&bytes), None, "{length} bytes");
        }
    }

    #[test]
    fn a_library_that_is_nowhere_is_named() {
        let mut state = Loading::default();
        state.load("libcuda_of_no_machine.so.99", &[PathBuf::from("/nowhere")]);
        assert_eq!(state.missing.into_iter().collect::<Vec<_>>(), ["libcuda_of_no_machine.so.99"]);
        assert!(is_sought("libcudart.so.13") && is_sought("libnvinfer.so.10") && !is_sought("libstdc++.so.6"));
    }

    #[test]
    fn packages_hold_their_libraries_below() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["nvidia/cu13/lib", "nvidia/cudnn/lib"] {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let found = libraries_below(&root.path().join("nvidia"));
        let names: Vec<_> =
            found.iter().map(|path| path.strip_prefix(root.path()).unwrap().display().to_string()).collect();
        assert_eq!(names, ["nvidia/cu13/lib", "nvidia/cudnn/lib"]);
    }
}
