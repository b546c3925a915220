//! Tensor data in files beside a model.
//!
//! <https://onnx.ai/onnx/repo-docs/ExternalData.html>. A location is a path relative to the model's folder; whatever leads out
//! of that folder is refused, since a model is data from elsewhere and must not read other files.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use super::{DataType, Error, Result, TensorDef};
use crate::files;

/// Where a written tensor begins is a multiple of this: the page size that the specification asks for, so that a tensor can
/// be memory-mapped by itself. Tensors too small to be worth a page belong into the model.
pub const EXTERNAL_ALIGNMENT: u64 = 4096;

/// A piece of a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalRef {
    /// The file, relative to the model's folder.
    pub location: String,
    /// The first byte.
    pub offset: u64,
    /// The number of bytes; none when the model leaves it to the tensor's shape.
    pub length: Option<u64>,
}

impl ExternalRef {
    pub(crate) fn from_entries(tensor: &str, entries: &[(String, String)]) -> Result<Self> {
        let text = |key: &str| entries.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str());
        let number = |key: &'static str| match text(key) {
            None => Ok(None),
            Some(value) => value.parse().map(Some).map_err(|_| Error::ExternalEntry {
                tensor: tensor.to_owned(),
                key,
                value: value.to_owned(),
            }),
        };
        let location = text("location").unwrap_or_default().to_owned();
        Ok(Self { location, offset: number("offset")?.unwrap_or(0), length: number("length")? })
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'static str, String)> {
        let length = self.length.map(|length| ("length", length.to_string()));
        [("location", self.location.clone()), ("offset", self.offset.to_string())].into_iter().chain(length)
    }

    /// The data file's path, once it is known to be in the model's folder.
    ///
    /// # Errors
    /// When the location is absolute, leads out of the folder by itself or by a link, or names no file.
    pub fn resolve(&self, tensor: &str, folder: &Path) -> Result<PathBuf> {
        check_location(tensor, &self.location)?;
        let path = folder.join(&self.location);
        let real = path.canonicalize().map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::NoDataFile { tensor: tensor.to_owned(), path: path.clone() },
            _ => files::Error::io("open", &path)(source).into(),
        })?;
        let home = folder.canonicalize().map_err(files::Error::io("open", folder))?;
        if !real.starts_with(&home) {
            return Err(location_error(tensor, &self.location, "is a link that leads out of the model's folder"));
        }
        Ok(real)
    }

    /// Whether `length` bytes of the piece lie in a file of `size` bytes.
    pub(super) fn check_fits(&self, tensor: &str, length: u64, path: &Path, size: u64) -> Result<()> {
        if self.offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        let (tensor, path, offset) = (tensor.to_owned(), path.to_owned(), self.offset);
        Err(Error::ShortDataFile { tensor, path, offset, length, size })
    }

    /// Reads the piece, which must be `expected` bytes long.
    pub(crate) fn read(&self, tensor: &str, expected: u64, folder: &Path) -> Result<Vec<u8>> {
        let path = self.resolve(tensor, folder)?;
        let mut file = files::open(&path)?;
        let size = file.metadata().map_err(files::Error::io("read", &path))?.len();
        let length = self.length.unwrap_or(expected);
        // Checked before anything is allocated: the length is the model's word, the size is the file system's.
        self.check_fits(tensor, length, &path, size)?;
        file.seek(SeekFrom::Start(self.offset)).map_err(files::Error::io("read", &path))?;
        let mut bytes = Vec::new();
        file.take(length).read_to_end(&mut bytes).map_err(files::Error::io("read", &path))?;
        Ok(bytes)
    }
}

pub(super) fn location_error(tensor: &str, location: &str, reason: &'static str) -> Error {
    Error::Location { tensor: tensor.to_owned(), location: location.to_owned(), reason }
}

/// Refuses a location that does not name a file below the model's folder, as far as its text can tell; what would lead out
/// on another system is refused too, since folders travel.
pub(super) fn check_location(tensor: &str, location: &str) -> Result<()> {
    let refuse = |reason| Err(location_error(tensor, location, reason));
    if location.contains('\0') {
        return refuse("holds a zero byte");
    }
    let has_drive = location.as_bytes().get(1) == Some(&b':');
    if location.starts_with(['/', '\\']) || has_drive || Path::new(location).is_absolute() {
        return refuse("is an absolute path");
    }
    if location.split(['/', '\\']).any(|name| name == "..") {
        return refuse("leads out of a folder with `..`");
    }
    if plain_location(location).as_os_str().is_empty() { refuse("names no file") } else { Ok(()) }
}

/// A location without `.` and doubled separators: two spellings of one file become one.
pub(super) fn plain_location(location: &str) -> PathBuf {
    Path::new(location).components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

/// Writes tensors one after the other into one data file, each by a callback, so that no more than one need be in memory.
#[derive(Debug)]
pub struct ExternalWriter {
    path: PathBuf,
    location: String,
    file: Counted<BufWriter<File>>,
}

impl ExternalWriter {
    /// Creates the data file `name` in the model's folder.
    ///
    /// # Errors
    /// When `name` is no plain path below the folder, or the file cannot be created.
    pub fn create(folder: &Path, name: &str) -> Result<Self> {
        check_location("", name)?;
        let path = folder.join(name);
        let file = File::create(&path).map_err(files::Error::io("create", &path))?;
        Ok(Self { path, location: name.to_owned(), file: Counted { inner: BufWriter::new(file), written: 0 } })
    }

    /// Writes into a file that will have this path and, in the model's folder, this name.
    pub(super) fn into_file(file: &File, path: &Path, name: &str) -> Result<Self> {
        check_location("", name)?;
        let file = file.try_clone().map_err(files::Error::io("write", path))?;
        let file = Counted { inner: BufWriter::new(file), written: 0 };
        Ok(Self { path: path.to_owned(), location: name.to_owned(), file })
    }

    /// Adds a tensor: `write` gives its little-endian bytes, as many as type and dimensions say. What comes back goes into
    /// a [`ModelBuilder`](super::ModelBuilder) or a [`Patch`](super::Patch).
    ///
    /// # Errors
    /// When the file cannot be written, `write` fails, or it gives another number of bytes.
    pub fn write(
        &mut self,
        name: &str,
        data_type: DataType,
        dims: &[i64],
        write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<TensorDef> {
        let external = self.place(name, data_type, dims, write)?;
        Ok(TensorDef::external(name, data_type, dims, external))
    }

    /// As [`write`](Self::write), and says where the tensor is.
    pub(super) fn place(
        &mut self,
        name: &str,
        data_type: DataType,
        dims: &[i64],
        write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<ExternalRef> {
        let size = || Error::TensorSize { tensor: name.into(), data_type, dims: dims.into(), found: 0, expected: None };
        let expected = data_type.byte_len(dims).ok_or_else(size)?;
        self.align().map_err(files::Error::io("write", &self.path))?;
        let offset = self.file.written;
        write(&mut self.file).map_err(files::Error::io("write", &self.path))?;
        let written = self.file.written.saturating_sub(offset);
        if written != expected {
            return Err(Error::Written { tensor: name.to_owned(), written, expected });
        }
        Ok(ExternalRef { location: self.location.clone(), offset, length: Some(expected) })
    }

    /// Ends the file, and says how long it is.
    ///
    /// # Errors
    /// When what is left in the buffer cannot be written.
    pub fn finish(mut self) -> Result<u64> {
        self.file.flush().map_err(files::Error::io("write", &self.path))?;
        Ok(self.file.written)
    }

    fn align(&mut self) -> std::io::Result<()> {
        let padding = self.file.written.next_multiple_of(EXTERNAL_ALIGNMENT) - self.file.written;
        std::io::copy(&mut std::io::repeat(0).take(padding), &mut self.file)?;
        Ok(())
    }
}

/// A writer that knows how much went through it.
#[derive(Debug)]
struct Counted<W> {
    inner: W,
    written: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = self.inner.write(bytes)?;
        self.written = self.written.saturating_add(taken as u64);
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use super::super::tests::reference_check;
    use super::super::{Model, ModelBuilder, NodeDef, ValueDef, external_files};
    use super::*;

    fn external(location: &str) -> ExternalRef {
        ExternalRef { location: location.to_owned(), offset: 0, length: None }
    }

    pub(in crate::onnx) fn model_with(tensors: Vec<TensorDef>) -> Model {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).input(ValueDef::new("x", DataType::Float, [2.into()]));
        for (position, tensor) in tensors.into_iter().enumerate() {
            let (from, to) =
                (if position == 0 { "x".into() } else { format!("h{}", position - 1) }, format!("h{position}"));
            builder.output(ValueDef::new(&to, DataType::Float, [2.into()]));
            builder.node(NodeDef::new("Add", &to).inputs([from, tensor.name().to_owned()]).outputs([to.clone()]));
            builder.initializer(tensor);
        }
        builder.build().unwrap()
    }

    #[test]
    fn tensors_are_streamed_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ExternalWriter::create(folder.path(), "model.onnx.data").unwrap();
        let mut write = |name: &str, values: [f32; 2]| {
            let put = |out: &mut dyn Write| values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()));
            writer.write(name, DataType::Float, &[2], put).unwrap()
        };
        let tensors = vec![write("a", [1.0, 2.0]), write("b", [3.0, -4.0])];
        assert_eq!(writer.finish().unwrap(), EXTERNAL_ALIGNMENT + 8);
        let path = folder.path().join("model.onnx");
        model_with(tensors).save(&path).unwrap();
        reference_check(&path);

        let model = Model::open(&path).unwrap();
        assert_eq!(external_files(&model).unwrap(), BTreeSet::from(["model.onnx.data".to_owned()]));
        let tensor = &model.graph().initializers()[1];
        assert_eq!(tensor.external().unwrap().offset, EXTERNAL_ALIGNMENT);
        assert!(matches!(tensor.to_f32s(), Err(Error::IsExternal { .. })));
        assert_eq!(tensor.data_in(folder.path()).unwrap().to_f32s().unwrap(), [3.0, -4.0]);

        let data = std::fs::OpenOptions::new().write(true).open(folder.path().join("model.onnx.data")).unwrap();
        data.set_len(EXTERNAL_ALIGNMENT + 7).unwrap();
        assert!(matches!(tensor.data_in(folder.path()), Err(Error::ShortDataFile { length: 8, .. })));
        std::fs::remove_file(folder.path().join("model.onnx.data")).unwrap();
        assert!(matches!(tensor.data_in(folder.path()), Err(Error::NoDataFile { .. })));
    }

    #[test]
    fn a_tensor_of_the_wrong_size_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ExternalWriter::create(folder.path(), "data").unwrap();
        let found = writer.write("w", DataType::Float, &[2], |out| out.write_all(&[0; 4]));
        assert!(matches!(found, Err(Error::Written { written: 4, expected: 8, .. })));
        let found = writer.write("w", DataType::Float, &[-2], |_| Ok(()));
        assert!(matches!(found, Err(Error::TensorSize { .. })));
        let found = writer.write("w", DataType::Float, &[2], |_| Err(std::io::ErrorKind::StorageFull.into()));
        assert!(matches!(found, Err(Error::Files(_))));
    }

    #[test]
    fn locations_that_leave_the_folder_are_refused() {
        for location in [
            "",
            ".",
            "./",
            "/etc/passwd",
            "../secret",
            "weights/../../secret",
            "a\0b",
            "..\\secret",
            "\\\\host\\share",
            "C:\\secret",
            "C:secret",
        ] {
            let tensor = TensorDef::external("w", DataType::Float, &[2], external(location));
            let model = model_with(vec![tensor]);
            assert!(matches!(external_files(&model), Err(Error::Location { .. })), "{location:?}");
            let read = model.graph().initializers()[0].data_in(Path::new("."));
            assert!(matches!(read, Err(Error::Location { .. })), "{location:?}");
            assert!(matches!(ExternalWriter::create(Path::new("."), location), Err(Error::Location { .. })));
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_that_leave_the_folder_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(root.path().join("secret"), [0; 8]).unwrap();
        std::fs::write(folder.join("real"), [0; 8]).unwrap();
        std::os::unix::fs::symlink("../secret", folder.join("out")).unwrap();
        std::os::unix::fs::symlink("real", folder.join("within")).unwrap();
        assert!(matches!(external("out").read("w", 8, &folder), Err(Error::Location { .. })));
        assert_eq!(external("within").read("w", 8, &folder).unwrap(), [0; 8]);
    }
}
