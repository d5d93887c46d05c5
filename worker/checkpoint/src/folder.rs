//! A folder as a store: that of `object_store`, but what is large goes past the cache of the file system.
//!
//! What is written to a checkpoint is not read again soon, and what is read is read once. Copying it into the cache and out of it was
//! most of the work. A file system that cannot be written or read directly, or wants it otherwise, is used as usual.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};
use rustix::fs::OFlags;

use crate::buffers::Buffers;

/// What is written or read directly begins and ends at multiples of this, in memory and in the file.
pub(crate) const ALIGNMENT: usize = 4096;
/// Shorter ranges are read as usual.
const DIRECT_BYTES_MIN: u64 = 1 << 20;

/// A folder.
#[derive(Debug)]
pub(crate) struct Folder {
    files: Arc<LocalFileSystem>,
    buffers: Buffers,
}

impl Folder {
    /// An existing one, in which what is written stays, whatever happens to the machine.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let files = LocalFileSystem::new_with_prefix(folder)?;
        let files = Arc::new(files.with_fsync(true).with_automatic_cleanup(true));
        Ok(Self { files, buffers: Buffers::default() })
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Folder {
    async fn put_opts(
        &self,
        location: &ObjectPath,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.files.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &ObjectPath,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let path = self.files.path_to_filesystem(location)?;
        let target = blocking(move || Target::create(path)).await?;
        Ok(Box::new(Upload { target: Arc::new(target), offset: 0, over: false }))
    }

    async fn get_opts(&self, location: &ObjectPath, options: GetOptions) -> Result<GetResult> {
        let only_looks = options.head;
        let found = self.files.get_opts(location, options).await?;
        let GetResultPayload::File(_, path) = &found.payload else { return Ok(found) };
        if only_looks || found.range.end - found.range.start < DIRECT_BYTES_MIN {
            return Ok(found);
        }
        let (path, range, buffers) = (path.clone(), found.range.clone(), self.buffers.clone());
        match blocking(move || read_directly(&path, range, &buffers)).await {
            Ok(bytes) => {
                let payload = GetResultPayload::Stream(stream::once(async { Ok(bytes) }).boxed());
                Ok(GetResult { payload, ..found })
            }
            // Where the file itself is at fault, reading it as usual says so.
            Err(_) => Ok(found),
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<ObjectPath>>,
    ) -> BoxStream<'static, Result<ObjectPath>> {
        self.files.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> Result<()> {
        self.files.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &ObjectPath, to: &ObjectPath, options: RenameOptions) -> Result<()> {
        self.files.rename_opts(from, to, options).await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await.map_err(io::Error::other).flatten();
    done.map_err(|error| Error::Generic { store: "Folder", source: error.into() })
}

const DIRECT: i32 = OFlags::DIRECT.bits().cast_signed();

/// Bytes of a file, past the cache.
fn read_directly(path: &Path, range: Range<u64>, buffers: &Buffers) -> io::Result<Bytes> {
    let file = OpenOptions::new().read(true).custom_flags(DIRECT).open(path)?;
    let start = range.start / ALIGNMENT as u64 * ALIGNMENT as u64;
    let wanted = (range.end - start) as usize;
    let length = wanted.next_multiple_of(ALIGNMENT);
    let mut lent = buffers.lend(length);
    let read = &mut lent.buffer;
    let before = read.len();
    while read.len() - before < wanted {
        let done = read.len() - before;
        let room = &mut read.spare_capacity_mut()[..length - done];
        let (filled, _) = rustix::io::pread(&file, room, start + done as u64)?;
        let filled = filled.len();
        if filled == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the kernel has filled so many bytes after those that were there.
        unsafe { read.set_len(before + done + filled) };
    }
    Ok(lent.bytes().slice(before + (range.start - start) as usize..before + wanted))
}

/// A file that gets its name when it is whole. Until then its name is that of an upload under way, as `object_store` names them.
struct Target {
    staged: PathBuf,
    path: PathBuf,
    file: File,
    /// The same file, past the cache.
    direct: Option<File>,
}

impl Target {
    fn create(path: PathBuf) -> io::Result<Self> {
        let (mut number, mut made) = (1, false);
        loop {
            let mut staged = path.clone().into_os_string();
            staged.push(format!("#{number}"));
            let staged = PathBuf::from(staged);
            match OpenOptions::new().write(true).create_new(true).open(&staged) {
                Ok(file) => {
                    let direct = OpenOptions::new().write(true).custom_flags(DIRECT).open(&staged).ok();
                    return Ok(Self { staged, path, file, direct });
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) if error.kind() == ErrorKind::NotFound && !made => {
                    make_folder(&path)?;
                    made = true;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn write(&self, offset: u64, part: &[u8]) -> io::Result<()> {
        let aligned = offset.is_multiple_of(ALIGNMENT as u64);
        let direct = self.direct.as_ref().filter(|_| aligned);
        let length = if direct.is_some() { part.len() / ALIGNMENT * ALIGNMENT } else { 0 };
        let (middle, rest) = part.split_at(length);
        match direct.map_or(Ok(()), |direct| direct.write_all_at(middle, offset)) {
            // This file system wants something else than multiples of pages.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                self.file.write_all_at(middle, offset)?;
            }
            written => written?,
        }
        self.file.write_all_at(rest, offset + length as u64)
    }

    fn publish(&self) -> io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.staged, &self.path)?;
        self.path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

/// Makes the folder of a file; another writer may do so at the same time.
fn make_folder(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder)?;
    folder.parent().map_or(Ok(()), |above| File::open(above)?.sync_all())
}

struct Upload {
    target: Arc<Target>,
    offset: u64,
    /// The file has its name, or is gone.
    over: bool,
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upload({})", self.target.path.display())
    }
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (target, offset) = (Arc::clone(&self.target), self.offset);
        self.offset += data.content_length() as u64;
        Box::pin(blocking(move || target.write(offset, &together(&data))))
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let target = Arc::clone(&self.target);
        blocking(move || target.publish()).await?;
        self.over = true;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn abort(&mut self) -> Result<()> {
        self.over = true;
        let target = Arc::clone(&self.target);
        blocking(move || std::fs::remove_file(&target.staged)).await
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.over {
            // Where it cannot be removed, garbage collection will.
            let _ = std::fs::remove_file(&self.target.staged);
        }
    }
}

/// All of a part, at an address from which it can be written directly.
fn together(data: &PutPayload) -> Bytes {
    match data.as_ref() {
        [one] if one.as_ptr().align_offset(ALIGNMENT) == 0 => one.clone(),
        chunks => {
            let mut part = aligned(data.content_length());
            let before = part.len();
            chunks.iter().for_each(|chunk| part.extend_from_slice(chunk));
            Bytes::from(part).slice(before..)
        }
    }
}

/// Room for so many bytes: what is put in after what is there already lies at an aligned address.
pub(crate) fn aligned(bytes: usize) -> Vec<u8> {
    let mut room = Vec::with_capacity(bytes + ALIGNMENT);
    align(&mut room);
    room
}

/// Empties a buffer, up to what is before its first aligned address.
pub(crate) fn align(room: &mut Vec<u8>) {
    room.clear();
    room.resize(room.as_ptr().align_offset(ALIGNMENT), 0);
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;

    use super::*;

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| (at * 7 % 251) as u8).collect()
    }

    #[tokio::test]
    async fn parts_of_any_length_join_to_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let store = Folder::open(folder.path()).unwrap();
        for lengths in
            [&[ALIGNMENT, 2 * ALIGNMENT, 5][..], &[3 * ALIGNMENT], &[7], &[ALIGNMENT, 9, ALIGNMENT]]
        {
            let path = ObjectPath::from("step/a file");
            let mut upload = store.put_multipart(&path).await.unwrap();
            let whole = content(lengths.iter().sum());
            let mut rest = &whole[..];
            let mut parts = Vec::new();
            for &length in lengths {
                let (part, after) = rest.split_at(length);
                // One that lies anywhere, in two pieces.
                let (a, b) = part.split_at(length / 3);
                parts.push(upload.put_part([a, b].into_iter().map(Bytes::copy_from_slice).collect()));
                rest = after;
            }
            assert!(store.get(&path).await.is_err(), "it has no name before it is whole");
            for part in parts.into_iter().rev() {
                part.await.unwrap();
            }
            upload.complete().await.unwrap();
            assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), whole);
            store.delete(&path).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn writers_that_begin_at_once_make_their_folder_together() {
        for _ in 0..50 {
            let folder = tempfile::tempdir().unwrap();
            let begin = |writer: usize| {
                let store = Folder::open(folder.path()).unwrap();
                let path = ObjectPath::from(format!("a/b/{writer}"));
                tokio::spawn(async move { store.put_multipart(&path).await.map(drop) })
            };
            let writers: Vec<_> = (0..8).map(begin).collect();
            for writer in writers {
                writer.await.unwrap().unwrap();
            }
        }
    }

    #[tokio::test]
    async fn any_range_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = Folder::open(folder.path()).unwrap();
        let (path, least) = (ObjectPath::from("file"), DIRECT_BYTES_MIN);
        let whole = content(3 * least as usize + 77);
        store.put(&path, whole.clone().into()).await.unwrap();
        let end = whole.len() as u64;
        for range in
            [0..least, 5..least + 5, 4096..2 * least, least - 1..end, 0..end, 9..10, end - least..end]
        {
            let read = store.get_range(&path, range.clone()).await.unwrap();
            assert!(read == whole[range.start as usize..range.end as usize], "{range:?}");
        }
        assert_eq!(store.buffers.kept(), 1);
        assert!(store.get_range(&path, end..end + least).await.is_err());
        assert!(read_directly(&folder.path().join("file"), end..end + 10_000, &store.buffers).is_err());
    }

    #[tokio::test]
    async fn a_look_at_a_file_reads_nothing_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Folder::open(folder.path()).unwrap();
        let path = ObjectPath::from("file");
        store.put(&path, content(2 * DIRECT_BYTES_MIN as usize).into()).await.unwrap();
        assert_eq!(store.head(&path).await.unwrap().size, 2 * DIRECT_BYTES_MIN);
        assert_eq!(store.buffers.kept(), 0);
    }

    #[tokio::test]
    async fn an_upload_that_ends_early_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Folder::open(folder.path()).unwrap();
        let path = ObjectPath::from("file");
        let mut aborted = store.put_multipart(&path).await.unwrap();
        let mut dropped = store.put_multipart(&path).await.unwrap();
        aborted.put_part(content(10_000).into()).await.unwrap();
        dropped.put_part(content(10_000).into()).await.unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        aborted.abort().await.unwrap();
        drop(dropped);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_part_is_taken_as_it_is_where_it_lies_well() {
        let mut part = aligned(100);
        let before = part.len();
        part.extend_from_slice(&content(100));
        let part = Bytes::from(part).slice(before..);
        assert_eq!(together(&part.clone().into()).as_ptr(), part.as_ptr());
        let elsewhere = part.slice(1..);
        let moved = together(&elsewhere.clone().into());
        assert_eq!((moved.as_ptr().align_offset(ALIGNMENT), &moved), (0, &elsewhere));
    }
}
