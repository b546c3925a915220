//! TensorBoard event files.
//!
//! A file is a sequence of TFRecords, each a serialised `tensorflow.Event` of which scalars need five fields:
//!
//! ```text
//! record   length u64 │ masked crc32c of it u32 │ event │ masked crc32c of it u32      (little endian)
//! Event    1: wall_time double, 2: step int64, 3: file_version string, 5: Summary, 7: SessionLog
//! Summary  1: Value { 1: tag string, 2: simple_value float }      SessionLog  1: status (1 is START)
//! ```

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Evaluation, Result, StepReport};
use crate::files;

/// Writes scalars to one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a new event file in `folder`. A run that goes on after step `resumed` says so, and TensorBoard drops what
    /// older files hold of later steps.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(folder: &Path, resumed: Option<usize>) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(files::Error::io("create folder", folder))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads the files of a folder in the order of their names
        let name = format!("events.out.tfevents.{}.{:09}.prefold", now.as_secs(), now.subsec_nanos());
        let path = folder.join(name);
        let file = File::create(&path).map_err(files::Error::io("create", &path))?;
        let mut writer = Self { path, file };
        writer.write(0, &field(3, b"brain.Event:2"))?;
        if let Some(step) = resumed {
            writer.write(step + 1, &field(7, &[8, 1]))?;
        }
        Ok(writer)
    }

    /// Writes the figures of a step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        let rate = report.tokens as f64 / report.seconds.max(1e-9);
        let fixed = [
            ("loss", report.loss),
            ("learning_rate", report.learning_rate),
            ("grad_norm", report.grad_norm),
            ("tokens_per_second", rate),
        ];
        let figures = report.figures.iter().map(|(name, value)| (name.as_str(), *value));
        self.scalars("train", report.step, fixed.into_iter().chain(figures))
    }

    /// Writes the figures of an evaluation.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn evaluation(&mut self, step: usize, evaluation: &Evaluation) -> Result<()> {
        let fixed = [("loss", evaluation.loss), ("accuracy", evaluation.accuracy)];
        let tokens = evaluation.token_accuracy.map(|accuracy| ("token_accuracy", accuracy));
        let figures = evaluation.figures.iter().map(|(name, value)| (name.as_str(), *value));
        self.scalars("eval", step, fixed.into_iter().chain(tokens).chain(figures))
    }

    fn scalars<'s>(&mut self, group: &str, step: usize, values: impl Iterator<Item = (&'s str, f64)>) -> Result<()> {
        let value = |(name, value): (&str, f64)| {
            let mut bytes = field(1, format!("{group}/{name}").as_bytes());
            bytes.push(2 << 3 | 5);
            bytes.extend((value as f32).to_le_bytes());
            field(1, &bytes)
        };
        let summary: Vec<u8> = values.flat_map(value).collect();
        self.write(step, &field(5, &summary))
    }

    /// Appends an event with its time.
    fn write(&mut self, step: usize, content: &[u8]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = vec![1 << 3 | 1];
        event.extend(now.as_secs_f64().to_le_bytes());
        event.push(2 << 3);
        event.extend(varint(step as u64));
        event.extend(content);
        Ok(self.file.write_all(&record(&event)).map_err(files::Error::io("write", &self.path))?)
    }
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 128 {
        bytes.push(value as u8 | 128);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A length-delimited protobuf field.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    [[number << 3 | 2].as_slice(), &varint(content.len() as u64), content].concat()
}

fn record(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    [&length, masked(&length).as_slice(), content, &masked(content)].concat()
}

/// The checksum of a TFRecord: crc32c, rotated and shifted, because records may hold checksums themselves.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli): RFC 3720, appendix B.4.
fn crc32c(bytes: &[u8]) -> u32 {
    let byte = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    };
    !bytes.iter().fold(!0, byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4, and the check value of the CRC catalogue.
    #[test]
    fn checksums_are_the_standard_s() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    /// The examples of the protobuf encoding's specification; `tests/it` reads whole files with TensorBoard.
    #[test]
    fn messages_are_protobuf() {
        assert_eq!(field(3, b"brain.Event:2"), b"\x1a\x0dbrain.Event:2");
        assert_eq!(varint(150), [0x96, 0x01]);
        assert_eq!(field(2, b"testing"), b"\x12\x07testing");
    }
}
