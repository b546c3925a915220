//! Kernels in the emulator, and what the CUDA compiler makes of them.

use std::process::Command;

use candle_core::{DType, Device};

use super::attention::tilings;
use super::emulator::Emulated;
use super::launch::Source;
use super::{Row, self_check};

fn report(rows: &[Row]) -> String {
    let failed = rows.iter().filter(|row| !row.holds());
    failed.map(|row| format!("{row:?}\n")).collect()
}

/// With the kernels, or without them in a build that has none.
#[test]
fn operations_of_the_cpu_are_what_they_are_in_float64() {
    let rows = self_check(&Device::Cpu).unwrap();
    assert!(rows.len() > 100 && rows.iter().all(Row::holds), "{}", report(&rows));
}

#[test]
fn kernels_are_their_operations_in_value_and_gradient() {
    let Some(_emulated) = Emulated::on_this_thread() else { return };
    let rows = self_check(&Device::Cpu).unwrap();
    if std::env::var_os("PREFOLD_SHOW").is_some() {
        rows.iter().for_each(|row| eprintln!("{row:?}"));
    }
    assert!(rows.len() > 100 && rows.iter().all(Row::holds), "{}", report(&rows));
}

/// Sources of every kernel: one for each type, and attention for heads that are used.
fn sources() -> Vec<(Source, DType)> {
    let mut sources = Vec::new();
    for real in [DType::F32, DType::BF16, DType::F16] {
        sources.extend([Source::Norm, Source::Rope, Source::Gate, Source::Loss].map(|source| (source, real)));
        sources.extend(tilings(real).map(|tiling| (Source::Attention(tiling), real)));
    }
    sources
}

/// nvcc from `CUDA_HOME` or the path.
fn nvcc() -> Option<std::path::PathBuf> {
    let home = std::env::var_os("CUDA_HOME").map(|home| std::path::Path::new(&home).join("bin/nvcc"));
    let nvcc = home.filter(|nvcc| nvcc.exists()).unwrap_or_else(|| "nvcc".into());
    Command::new(&nvcc).arg("--version").output().is_ok_and(|found| found.status.success()).then_some(nvcc)
}

#[test]
fn every_kernel_compiles_for_its_devices_and_spills_no_register() {
    let Some(nvcc) = nvcc() else {
        eprintln!("skipped: no nvcc (CUDA_HOME, or in the path)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for (source, real) in sources() {
        let path = folder.path().join("kernel.cu");
        std::fs::write(&path, source.text(real).unwrap()).unwrap();
        for architecture in ["sm_80", "sm_90"] {
            let mut command = Command::new(&nvcc);
            command.args([
                "-std=c++17",
                "-cubin",
                "-Werror",
                "all-warnings",
                "-Xptxas",
                "-v",
                "-arch",
                architecture,
                "-o",
            ]);
            let done = command.arg(folder.path().join("kernel.cubin")).arg(&path).output().unwrap();
            let log = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "{source:?} {real:?} {architecture}: {log}");
            let spills = log.lines().filter(|line| line.contains("spill") && !line.contains("0 bytes spill stores"));
            assert_eq!(spills.count(), 0, "{source:?} {real:?} {architecture}: {log}");
            assert_eq!(log.matches("Used ").count(), source.entries().len(), "{log}");
            if std::env::var_os("PREFOLD_SHOW").is_some() {
                let used = log.lines().filter_map(|line| line.split("Used ").nth(1));
                eprintln!("{source:?} {real:?} {architecture}: {:?}", used.collect::<Vec<_>>());
            }
        }
    }
}
