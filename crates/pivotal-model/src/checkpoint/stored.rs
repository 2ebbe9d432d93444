//! A tensor that stays in its file until somebody asks for its values.

use std::ops::Range;

use super::gguf_decoder::separate_halves;
use super::map::MappedFile;
use super::quantized::Storage;

/// Where a tensor's elements lie, and how.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) file: MappedFile,
    pub(super) bytes: Range<usize>,
    pub(super) storage: Storage,
    /// Heads and the width of one, where llama.cpp's converter has interleaved their rows.
    pub(super) interleaved: Option<[usize; 2]>,
}

impl Stored {
    /// The tensor whose elements are `data`, a part of `file`.
    ///
    /// # Panics
    /// If it is not.
    pub(super) fn new(file: &MappedFile, data: &[u8], storage: Storage) -> Self {
        let start = data.as_ptr().addr().wrapping_sub(file.as_ptr().addr());
        let bytes = start..start.wrapping_add(data.len());
        let is_inside = file.get(bytes.clone()).is_some();
        assert!(is_inside, "the tensor lies in another file");
        Self {
            file: file.clone(),
            bytes,
            storage,
            interleaved: None,
        }
    }

    pub(super) fn elements(&self) -> usize {
        self.storage.elements(self.bytes.len())
    }

    /// The elements, row-major; what was read of the file takes no memory afterwards.
    pub(super) fn read(&self) -> Vec<f32> {
        let values = self.storage.expand(&self.file[self.bytes.clone()]);
        self.file.forget(self.bytes.clone());
        match self.interleaved {
            Some([heads, head_dim]) => separate_halves(&values, heads, head_dim),
            None => values,
        }
    }
}
