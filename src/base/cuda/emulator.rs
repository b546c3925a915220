//! Kernels on the CPU, for tests: the same sources and calls, compiled as C++ with `tests/cuda/emulator.h`.

use std::cell::Cell;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result, Storage};
use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::launch::{Argument, Call, Source};

const HEADER: &str = include_str!("../../../tests/cuda/emulator.h");

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
    static BACKWARDS: Cell<bool> = const { Cell::new(false) };
    static MUTANT: Cell<Option<[&'static str; 2]>> = const { Cell::new(None) };
}

/// While it lives, operations of its thread on CPU tensors are kernels in the emulator.
pub(crate) struct Emulated;

impl Emulated {
    /// None without a C++ compiler.
    pub(crate) fn on_this_thread() -> Option<Self> {
        let has_compiler = Command::new(compiler()).arg("--version").output().is_ok_and(|found| found.status.success());
        if !has_compiler {
            eprintln!("skipped: no C++ compiler (CXX, or c++ in the path)");
            return None;
        }
        ACTIVE.set(true);
        Some(Self)
    }

    /// Runs the threads of a block in the opposite order.
    pub(crate) fn backwards(&self, is_so: bool) {
        BACKWARDS.set(is_so);
    }

    /// Runs kernels whose source has the second text in the place of the first.
    pub(crate) fn mutant(&self, change: [&'static str; 2]) {
        MUTANT.set(Some(change));
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        ACTIVE.set(false);
        BACKWARDS.set(false);
        MUTANT.set(None);
    }
}

pub(super) fn is_active() -> bool {
    ACTIVE.get()
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// The program that runs the kernels of a file, compiled where that has not been done.
fn program(source: Source, real: DType) -> PathBuf {
    static COMPILING: Mutex<()> = Mutex::new(());
    let _one = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
    let entries: String = source.entries().iter().map(|entry| format!("ENTRY({entry}), ")).collect();
    let mut text = source.text(real).unwrap();
    if let Some([from, to]) = MUTANT.get() {
        text = text.replace(from, to);
    }
    let (real, rest) = text.split_once('\n').unwrap();
    let main = format!(
        "static const emulator::Entry entries[] = {{{entries}}};\nint main() {{ return emulator::serve(entries, sizeof(entries) / \
         sizeof(*entries)); }}\n"
    );
    let text = format!("{real}\n{HEADER}\n{rest}\n{main}");
    let folder = std::env::temp_dir().join("prefold-emulated-kernels");
    std::fs::create_dir_all(&folder).unwrap();
    let name: String = Sha256::digest(text.as_bytes()).iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    let path = folder.join(&name);
    if !path.exists() {
        let part = folder.join(format!("{name}-{}", std::process::id()));
        let cpp = part.with_extension("cpp");
        std::fs::write(&cpp, text).unwrap();
        let flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-o"];
        let done = Command::new(compiler()).args(flags).arg(&part).arg(&cpp).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        std::fs::remove_file(&cpp).unwrap();
        std::fs::rename(&part, &path).unwrap();
    }
    path
}

fn bytes(storage: &CpuStorage) -> Vec<u8> {
    match storage {
        CpuStorage::U8(x) => x.clone(),
        CpuStorage::U32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        CpuStorage::F32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        CpuStorage::F64(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        CpuStorage::BF16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        CpuStorage::F16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        other => panic!("{other:?}"),
    }
}

fn storage(dtype: DType, bytes: &[u8]) -> CpuStorage {
    fn numbers<const N: usize, T>(bytes: &[u8], of: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.chunks_exact(N).map(|bytes| of(bytes.try_into().unwrap())).collect()
    }
    match dtype {
        DType::F32 => CpuStorage::F32(numbers(bytes, f32::from_le_bytes)),
        DType::F64 => CpuStorage::F64(numbers(bytes, f64::from_le_bytes)),
        DType::BF16 => CpuStorage::BF16(numbers(bytes, bf16::from_le_bytes)),
        DType::F16 => CpuStorage::F16(numbers(bytes, f16::from_le_bytes)),
        other => panic!("{other:?}"),
    }
}

/// Runs a call; see [`Call::run`].
pub(super) fn run(call: &Call, outputs: &[(DType, usize)]) -> Result<Vec<Storage>> {
    let new: Vec<_> = outputs.iter().map(|(dtype, count)| (*dtype, dtype.size_in_bytes() * count, None)).collect();
    Ok(launch(call, new)?.into_iter().map(Storage::Cpu).collect())
}

/// Runs a call on an output that exists.
pub(super) fn run_on(call: &Call, output: &mut CpuStorage) -> Result<()> {
    let given = vec![(output.dtype(), bytes(output).len(), Some(output.clone()))];
    match launch(call, given)?.pop() {
        Some(made) => *output = made,
        None => return Err(call.error("no output")),
    }
    Ok(())
}

/// Runs a call on outputs of a type, a length in bytes and, where they are given, their numbers.
fn launch(call: &Call, outputs: Vec<(DType, usize, Option<CpuStorage>)>) -> Result<Vec<CpuStorage>> {
    let mut request: Vec<u8> = Vec::new();
    let word = |request: &mut Vec<u8>, word: u64| request.extend(word.to_le_bytes());
    word(&mut request, call.entry.len() as u64);
    request.extend(call.entry.as_bytes());
    let sizes = call.grid.into_iter().chain(call.block).chain([1, call.shared, BACKWARDS.get().into()]);
    sizes.for_each(|size| word(&mut request, size as u64));
    let inputs = call.arguments.iter().filter(|argument| matches!(argument, Argument::Input(_))).count();
    word(&mut request, (outputs.len() + inputs) as u64);
    for (_, length, given) in &outputs {
        [1, given.is_some().into(), *length as u64].into_iter().for_each(|x| word(&mut request, x));
        request.extend(given.iter().flat_map(bytes));
    }
    let mut words = Vec::new();
    let mut buffer = outputs.len() as u64;
    for argument in &call.arguments {
        words.push(match argument {
            Argument::Input(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                let Storage::Cpu(storage) = &*storage else { return Err(call.error("an input is not on the CPU")) };
                let bytes = bytes(storage);
                [0, 1, bytes.len() as u64].into_iter().for_each(|x| word(&mut request, x));
                request.extend(bytes);
                buffer += 1;
                [1, buffer - 1, (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64]
            }
            Argument::None => [0, 0, 0],
            Argument::Output(at) => [1, *at as u64, 0],
            Argument::I32(x) => [0, u64::from(x.cast_unsigned()), 0],
            Argument::I64(x) => [0, x.cast_unsigned(), 0],
            Argument::F32(x) => [0, u64::from(x.to_bits()), 0],
            Argument::F64(x) => [0, x.to_bits(), 0],
        });
    }
    word(&mut request, words.len() as u64);
    words.into_iter().flatten().for_each(|x| word(&mut request, x));
    let program = Command::new(program(call.source, call.real))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut program = program.map_err(|why| call.error(why))?;
    // a program that gives up early says why on its own
    drop(program.stdin.take().map(|mut stdin| stdin.write_all(&request)));
    let answer = program.wait_with_output().map_err(|why| call.error(why))?;
    if !answer.status.success() {
        return Err(call.error(format!("{} {}", answer.status, String::from_utf8_lossy(&answer.stderr))));
    }
    let mut rest = &answer.stdout[..];
    let outputs = outputs.into_iter().map(|(dtype, length, _)| {
        let (bytes, after) = rest.split_at_checked(length).ok_or_else(|| call.error("its answer is short"))?;
        rest = after;
        Ok(storage(dtype, bytes))
    });
    outputs.collect()
}
