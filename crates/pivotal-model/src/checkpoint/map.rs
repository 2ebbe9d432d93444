//! The crate's one memory map.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of a file, read when they are looked at; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct MappedFile(Arc<Mmap>);

/// Maps a whole file into memory, to read.
#[allow(unsafe_code)]
pub(crate) fn map_file(path: &Path) -> Result<MappedFile> {
    let file = File::open(path).map_err(|source| Error::read(path, source))?;
    // SAFETY: the map is private to this crate, read-only, and dropped once a decoder has been made of its tensors. Pivotal
    // never writes to a model file in place (every write is a rename), so its own processes cannot change these bytes;
    // another program that truncates the file meanwhile ends this one by signal, as with every mapped file.
    let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::read(path, source))?;
    Ok(MappedFile(Arc::new(map)))
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl MappedFile {
    /// Takes the pages of `range` out of this process's memory: whoever looks at them again reads the file again. Without it a
    /// model that is read tensor by tensor is in memory twice at the end.
    #[allow(unsafe_code)]
    pub(crate) fn forget(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is of a file and read-only, so that no page of it holds what the file does not.
            let advised = unsafe {
                self.0
                    .unchecked_advise_range(DontNeed, range.start, range.len())
            };
            // It is advice: where it is not taken, more memory is used and nothing else changes.
            drop(advised);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_the_files_bytes_and_survives_its_removal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights");
        std::fs::write(&path, b"pivotal").unwrap();
        let map = map_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&map[..], b"pivotal");
        assert!(map_file(&path).is_err());
        std::fs::write(&path, b"").unwrap();
        assert!(map_file(&path).unwrap().is_empty());
    }

    #[test]
    fn what_was_forgotten_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights");
        let bytes: Vec<u8> = (0..50_000_u32).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = map_file(&path).unwrap();
        assert_eq!(map[..], bytes);
        for range in [5_000..40_000, 0..50_000, 7..7, 49_999..50_000] {
            map.forget(range);
            assert_eq!(map[..], bytes);
        }
    }
}
