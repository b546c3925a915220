//! Single files out of Python wheels, the one kind of download that works wherever pip does.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{Error, Result, StagedFolder, TemporaryFolder, sha256_file};

/// The environment variable that names the Python interpreter.
const PYTHON_VARIABLE: &str = "PREFOLD_PYTHON";

/// How many of pip's last lines an error repeats.
const REASON_LINES: usize = 6;

/// A wheel on disk. A downloaded one is removed when this is dropped.
#[derive(Debug)]
pub struct Wheel {
    path: PathBuf,
    archive: zip::ZipArchive<File>,
    _download: Option<TemporaryFolder>,
}

/// A file to take out of a wheel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Path inside the wheel, with `/`.
    pub path: String,
    /// The content's pinned SHA-256 in hexadecimal; without one the wheel's own record decides.
    pub sha256: Option<String>,
}

/// Runs the Python interpreter (`PREFOLD_PYTHON`, else `python3`) and waits for it.
///
/// # Errors
/// When it does not start.
pub fn run_python<'a>(arguments: impl IntoIterator<Item = &'a std::ffi::OsStr>) -> Result<Output> {
    run_program(&python(), arguments)
}

fn run_program<'a>(
    program: &std::ffi::OsStr,
    arguments: impl IntoIterator<Item = &'a std::ffi::OsStr>,
) -> Result<Output> {
    Command::new(program)
        .args(arguments)
        .output()
        .map_err(|source| Error::Python { program: program.to_string_lossy().into_owned(), source })
}

fn python() -> OsString {
    std::env::var_os(PYTHON_VARIABLE).filter(|value| !value.is_empty()).unwrap_or_else(|| "python3".into())
}

impl Wheel {
    /// Downloads the wheel of a requirement (`name==version`) with pip, into a temporary folder inside `beside` so that
    /// what is unpacked next to it needs no second disk. `extra` goes to pip: `--python-version 3.12`, `--platform …`.
    ///
    /// # Errors
    /// When Python or pip is missing, pip finds no wheel, or the download fails.
    pub fn download(requirement: &str, extra: &[&str], beside: &Path) -> Result<Self> {
        Self::download_with(&python(), requirement, extra, beside)
    }

    fn download_with(program: &std::ffi::OsStr, requirement: &str, extra: &[&str], beside: &Path) -> Result<Self> {
        std::fs::create_dir_all(beside).map_err(Error::io("create folder", beside))?;
        let folder = TemporaryFolder::within(beside, ".download").map_err(Error::io("create a folder in", beside))?;
        let fixed = ["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"];
        let wanted = ["--no-deps", "--only-binary=:all:", "--dest"];
        let arguments = fixed.into_iter().chain(wanted).map(std::ffi::OsStr::new);
        let arguments = arguments.chain([folder.path().as_os_str()]);
        let arguments = arguments.chain(extra.iter().map(std::ffi::OsStr::new)).chain(["--".as_ref()]);
        let output = run_program(program, arguments.chain([requirement.as_ref()]))?;
        if !output.status.success() {
            return Err(pip_error(program, requirement, &String::from_utf8_lossy(&output.stderr)));
        }
        let path = downloaded(folder.path(), requirement)?;
        let mut wheel = Self::open(&path)?;
        wheel._download = Some(folder);
        Ok(wheel)
    }

    /// Opens a wheel that is already there.
    ///
    /// # Errors
    /// When it is not a readable zip archive.
    pub fn open(path: &Path) -> Result<Self> {
        let file = super::open(path)?;
        let archive = zip::ZipArchive::new(file).map_err(|error| damaged(path, error))?;
        Ok(Self { path: path.into(), archive, _download: None })
    }

    /// The paths of all files in the wheel.
    pub fn members(&self) -> Vec<String> {
        let names = (0..self.archive.len()).filter_map(|index| self.archive.name_for_index(index));
        names.filter_map(|name| name.ok().map(std::borrow::Cow::into_owned)).collect()
    }

    /// Unpacks files, each under its own name without its folders, into `target`, which then holds nothing else. The
    /// folder appears whole or not at all.
    ///
    /// # Errors
    /// When a member is missing, has an unsafe path, or its content is not the pinned or recorded one, or when the
    /// folder cannot be written.
    pub fn unpack(&mut self, members: &[Member], target: &Path) -> Result<PathBuf> {
        let record = self.record()?;
        let staged = StagedFolder::over(target)?;
        for member in members {
            let name = self.safe_name(&member.path)?;
            let path = staged.path().join(name);
            self.extract(&member.path, &path)?;
            let expected = member.sha256.clone().or_else(|| record_hash(&record, &member.path));
            let expected =
                expected.ok_or_else(|| damaged(&self.path, format!("its record has no sha256 of {}", member.path)))?;
            check_hash(&member.path, &path, &expected)?;
        }
        staged.commit()
    }

    /// The file name that a member gets outside, which is one path component whatever the archive says.
    fn safe_name(&mut self, member: &str) -> Result<PathBuf> {
        let entry = self.archive.by_name(member).map_err(|error| entry_error(&self.path, member, error))?;
        let inside = entry.enclosed_name().filter(|_| entry.is_file());
        let name = inside.as_deref().and_then(Path::file_name).map(PathBuf::from);
        name.ok_or_else(|| damaged(&self.path, format!("the path of {member} leaves the archive")))
    }

    fn extract(&mut self, member: &str, to: &Path) -> Result<()> {
        let mut entry = self.archive.by_name(member).map_err(|error| entry_error(&self.path, member, error))?;
        let mut file = File::create(to).map_err(Error::io("create", to))?;
        // A read error is the archive's fault and a write error the disk's; `copy` does not tell them apart, the kind
        // does: decompression reports damage as invalid data or an early end.
        match std::io::copy(&mut entry, &mut file) {
            Ok(_) => Ok(()),
            Err(error) if is_damage(&error) => Err(damaged(&self.path, format!("{member}: {error}"))),
            Err(source) => Err(Error::Io { action: "write", path: to.into(), source }),
        }
    }

    /// The wheel's `RECORD`: one line per file, `path,sha256=DIGEST,size`, digests in URL-safe base64.
    fn record(&mut self) -> Result<String> {
        let is_record = |name: &&String| name.ends_with(".dist-info/RECORD") && name.matches('/').count() == 1;
        let Some(name) = self.members().iter().find(is_record).cloned() else {
            return Err(Error::NoMember { path: self.path.clone(), member: "*.dist-info/RECORD".into() });
        };
        let entry = self.archive.by_name(&name).map_err(|error| entry_error(&self.path, &name, error))?;
        std::io::read_to_string(entry).map_err(|error| damaged(&self.path, format!("{name}: {error}")))
    }
}

fn is_damage(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof};
    matches!(error.kind(), InvalidData | InvalidInput | Other | UnexpectedEof)
}

fn damaged(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Wheel { path: path.into(), reason: reason.to_string() }
}

fn entry_error(path: &Path, member: &str, error: zip::result::ZipError) -> Error {
    match error {
        zip::result::ZipError::FileNotFound => Error::NoMember { path: path.into(), member: member.into() },
        error => damaged(path, format!("{member}: {error}")),
    }
}

fn check_hash(what: &str, path: &Path, expected: &str) -> Result<()> {
    let got = sha256_file(path)?;
    if got == expected {
        return Ok(());
    }
    Err(Error::Hash { what: what.into(), expected: expected.into(), got })
}

/// The digest of a member in hexadecimal, if the record states one.
fn record_hash(record: &str, member: &str) -> Option<String> {
    let rest = record.lines().find_map(|line| line.strip_prefix(member)?.strip_prefix(",sha256="))?;
    let digest = rest.split(',').next()?;
    let mut bits = 0u32;
    let mut pending = 0u32;
    let mut hex = String::with_capacity(64);
    for symbol in digest.trim_end_matches('=').bytes() {
        bits = (bits << 6) | base64_value(symbol)?;
        pending += 6;
        if pending >= 8 {
            pending -= 8;
            hex.push_str(&format!("{:02x}", (bits >> pending) & 0xff));
            bits &= (1 << pending) - 1;
        }
    }
    Some(hex)
}

/// The value of a symbol of URL-safe base64 (RFC 4648, section 5).
fn base64_value(symbol: u8) -> Option<u32> {
    let value = match symbol {
        b'A'..=b'Z' => symbol - b'A',
        b'a'..=b'z' => symbol - b'a' + 26,
        b'0'..=b'9' => symbol - b'0' + 52,
        b'-' => 62,
        b'_' => 63,
        _ => return None,
    };
    Some(value.into())
}

fn downloaded(folder: &Path, requirement: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    paths.find(|path| path.extension().is_some_and(|extension| extension == "whl")).ok_or_else(|| Error::Pip {
        requirement: requirement.into(),
        reason: "pip reported success and left no wheel".into(),
    })
}

fn pip_error(program: &std::ffi::OsStr, requirement: &str, stderr: &str) -> Error {
    let requirement = requirement.to_owned();
    if stderr.contains("No module named pip") {
        return Error::NoPip { program: program.to_string_lossy().into_owned(), requirement };
    }
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    let reason = lines.get(lines.len().saturating_sub(REASON_LINES)..).unwrap_or_default().join("\n");
    if stderr.contains("No matching distribution found") {
        return Error::NoWheel { requirement, reason };
    }
    Error::Pip { requirement, reason }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// SHA-256 of "abc" (FIPS 180-4) as a wheel's record writes it.
    const ABC: &str = "ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0";
    const ABC_HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn wheel(folder: &Path, files: &[(&str, &str)], record: &str) -> PathBuf {
        let path = folder.join("demo-1-py3-none-any.whl");
        let mut archive = zip::ZipWriter::new(File::create(&path).unwrap());
        for (name, content) in files.iter().copied().chain([("demo-1.dist-info/RECORD", record)]) {
            archive.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
            archive.write_all(content.as_bytes()).unwrap();
        }
        archive.finish().unwrap();
        path
    }

    fn member(path: &str, sha256: Option<&str>) -> Member {
        Member { path: path.into(), sha256: sha256.map(Into::into) }
    }

    #[test]
    fn a_recorded_digest_reads_as_hexadecimal() {
        let record = format!("demo/ab,sha256=x,3\ndemo/abc,sha256={ABC},3\n");
        assert_eq!(record_hash(&record, "demo/abc").unwrap(), ABC_HEX);
        assert_eq!(record_hash(&record, "demo/a"), None);
    }

    #[test]
    fn unpacks_checked_files_or_nothing() {
        let root = tempfile::tempdir().unwrap();
        let record = format!("demo/abc,sha256={ABC},3\ndemo/bad,sha256={ABC},3\n");
        let path = wheel(root.path(), &[("demo/abc", "abc"), ("demo/bad", "abd"), ("demo/free", "abc")], &record);
        let mut wheel = Wheel::open(&path).unwrap();
        let target = root.path().join("out");

        let bad = wheel.unpack(&[member("demo/abc", None), member("demo/bad", None)], &target);
        assert!(matches!(bad, Err(Error::Hash { ref expected, .. }) if expected == ABC_HEX));
        let missing = wheel.unpack(&[member("demo/none", None)], &target);
        assert!(matches!(missing, Err(Error::NoMember { .. })));
        assert!(matches!(wheel.unpack(&[member("demo/free", None)], &target), Err(Error::Wheel { .. })));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "only the wheel is left");

        wheel.unpack(&[member("demo/abc", None), member("demo/free", Some(ABC_HEX))], &target).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("abc")).unwrap(), "abc");
        assert_eq!(std::fs::read_to_string(target.join("free")).unwrap(), "abc");
    }

    #[test]
    fn a_path_that_leaves_the_archive_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = wheel(root.path(), &[("../abc", "abc")], &format!("../abc,sha256={ABC},3\n"));
        let result = Wheel::open(&path).unwrap().unpack(&[member("../abc", None)], &root.path().join("out"));
        assert!(matches!(result, Err(Error::Wheel { .. })), "{result:?}");
    }

    #[test]
    fn a_truncated_wheel_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let path = wheel(root.path(), &[("demo/abc", "abc")], "");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(matches!(Wheel::open(&path), Err(Error::Wheel { .. })));
    }

    #[cfg(unix)]
    fn script(folder: &Path, body: &str) -> OsString {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join("python");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.into()
    }

    #[cfg(unix)]
    #[test]
    fn each_failure_of_pip_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let attempt = |program: &OsString| Wheel::download_with(program, "demo==1", &[], root.path()).unwrap_err();

        assert!(matches!(attempt(&"/nowhere/python".into()), Error::Python { .. }));
        let no_pip = script(root.path(), "echo 'python3: No module named pip' >&2; exit 1");
        assert!(matches!(attempt(&no_pip), Error::NoPip { .. }));
        let none = script(root.path(), "echo 'ERROR: No matching distribution found for demo==1' >&2; exit 1");
        assert!(matches!(attempt(&none), Error::NoWheel { .. }));
        let full = script(root.path(), "seq 1 20 >&2; echo 'No space left on device' >&2; exit 1");
        let Error::Pip { reason, .. } = attempt(&full) else { panic!("not a pip error") };
        assert_eq!(reason, "16\n17\n18\n19\n20\nNo space left on device");
        let empty = script(root.path(), "exit 0");
        assert!(matches!(attempt(&empty), Error::Pip { .. }));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "only the script is left");
    }

    #[cfg(unix)]
    #[test]
    fn a_downloaded_wheel_is_removed_afterwards() {
        let root = tempfile::tempdir().unwrap();
        let shelf = tempfile::tempdir().unwrap();
        let path = wheel(shelf.path(), &[("demo/abc", "abc")], "");
        // pip's arguments: the folder follows --dest.
        let body = format!(
            "while [ \"$1\" != --dest ]; do shift; done; cp '{}' \"$2\"/demo-1-py3-none-any.whl",
            path.display()
        );
        let program = script(shelf.path(), &body);
        let wheel = Wheel::download_with(&program, "demo==1", &["--python-version", "3.12"], root.path()).unwrap();
        assert_eq!(wheel.members(), ["demo/abc", "demo-1.dist-info/RECORD"]);
        drop(wheel);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
