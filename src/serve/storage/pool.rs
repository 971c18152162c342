//! Bounce buffers: one region of pages, mapped once, handed out in contiguous runs.
//!
//! The region is one mapping so that io_uring registers it as one fixed buffer, whose pages the kernel pins once
//! instead of at every transfer. A buffer takes only the pages that it needs, so a pool serves many small requests
//! or a few large ones. The pool takes the lowest free run first: a lightly loaded disk uses few pages, which
//! stay in the cache. The pool asks for huge pages: the kernel then passes a large buffer to the device as one segment instead
//! of one for each page.

#![allow(unsafe_code)] // The region is memory that the kernel writes to, so no Rust allocation owns it.

use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// The granularity of the pool: the unit of O_DIRECT's memory alignment on every machine that we run on.
pub const PAGE: usize = PAGE_U32 as usize;
/// The same as io_uring's lengths and statx(2)'s alignments have it.
pub(super) const PAGE_U32: u32 = 4096;
/// Of x86-64 and of AArch64 with pages of 4 KiB; where it is another, there are fewer huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// A run of pages, owned: it goes back to the pool that it came from by [`Pool::give`].
#[derive(Debug)]
#[must_use = "a buffer that is not given back is lost to its pool"]
pub struct Buffer {
    first_page: u32,
    pages: u32,
    len: u32,
}

impl Buffer {
    /// Its length in bytes, as it was asked for and never 0.
    #[expect(clippy::len_without_is_empty, reason = "no buffer is empty")]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// The same as io_uring has it.
    pub(super) fn len_u32(&self) -> u32 {
        self.len
    }

    fn offset(&self) -> usize {
        self.first_page as usize * PAGE
    }
}

/// The pages, and which of them are free.
#[derive(Debug)]
pub(super) struct Pool {
    memory: NonNull<u8>,
    pages: u32,
    /// A bit a page, 1 = free; bits past the last page are 0.
    free: Vec<u64>,
}

// SAFETY: the mapping belongs to the pool alone and is not bound to a thread.
unsafe impl Send for Pool {}

impl Pool {
    /// Maps `pages` pages.
    pub(super) fn new(pages: u32) -> io::Result<Self> {
        let len = pages as usize * PAGE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let mapping = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len + HUGE_PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        // Kernels before 6.7 align no mapping for huge pages.
        let before = mapping.cast::<u8>().align_offset(HUGE_PAGE);
        let memory = mapping.wrapping_byte_add(before);
        for (rest, len) in [
            (mapping, before),
            (memory.wrapping_byte_add(len), HUGE_PAGE - before),
        ] {
            if len > 0 {
                // SAFETY: it is that part of the mapping that nothing is going to use.
                unsafe { rustix::mm::munmap(rest, len) }?;
            }
        }
        // Where the kernel has no huge pages, storage is slower.
        // SAFETY: the range is what is left of the mapping, and the advice changes nothing of what it holds.
        let _ = unsafe { rustix::mm::madvise(memory, len, Advice::LinuxHugepage) };
        let memory =
            NonNull::new(memory.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut pool = Self {
            memory,
            pages,
            free: vec![0; pages.div_ceil(u64::BITS) as usize],
        };
        pool.mark(0, pages, true);
        Ok(pool)
    }

    /// The whole region, for registration with io_uring.
    pub(super) fn region(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.memory.as_ptr().cast(),
            iov_len: self.pages as usize * PAGE,
        }
    }

    /// Takes a buffer of `len` bytes, or none if no run of free pages is long enough.
    pub(super) fn take(&mut self, len: u32) -> Option<Buffer> {
        let pages = len.div_ceil(PAGE_U32);
        if pages == 0 {
            return None;
        }
        let first_page = self.find_run(pages)?;
        self.mark(first_page, pages, false);
        Some(Buffer {
            first_page,
            pages,
            len,
        })
    }

    /// Takes a buffer back.
    pub(super) fn give(&mut self, buffer: Buffer) {
        self.mark(buffer.first_page, buffer.pages, true);
    }

    /// Where the buffer lies, for the kernel.
    ///
    /// # Panics
    /// If the buffer lies beyond the pool's end, so that it cannot be of this pool.
    pub(super) fn address(&self, buffer: &Buffer) -> *mut u8 {
        assert!(
            buffer.first_page + buffer.pages <= self.pages,
            "a buffer of another pool"
        );
        // SAFETY: just above, the buffer was found to lie within the mapping.
        unsafe { self.memory.as_ptr().add(buffer.offset()) }
    }

    /// The bytes of a buffer.
    pub(super) fn bytes(&self, buffer: &Buffer) -> &[u8] {
        // SAFETY: the pages are mapped and initialised by the kernel. They belong to `buffer`, which its owner took from
        // this pool (a worker has one) and has not handed to the kernel, which would have taken it by value.
        unsafe { std::slice::from_raw_parts(self.address(buffer), buffer.len()) }
    }

    /// The bytes of a buffer, to be filled.
    pub(super) fn bytes_mut(&mut self, buffer: &mut Buffer) -> &mut [u8] {
        // SAFETY: as for `bytes`; the exclusive borrows of pool and buffer make the slice the only one.
        unsafe { std::slice::from_raw_parts_mut(self.address(buffer), buffer.len()) }
    }

    /// The first page of the lowest run of `wanted` free pages.
    fn find_run(&self, wanted: u32) -> Option<u32> {
        let mut start = self.next_page(0, true)?;
        loop {
            let end = self.next_page(start, false).unwrap_or(self.pages);
            if end - start >= wanted {
                return Some(start);
            }
            start = self.next_page(end, true)?;
        }
    }

    /// The lowest page from `from` on that is free, or that is not.
    fn next_page(&self, from: u32, free: bool) -> Option<u32> {
        let mut word = from / u64::BITS;
        let mut mask = u64::MAX << (from % u64::BITS);
        while let Some(&bits) = self.free.get(word as usize) {
            let found = if free { bits } else { !bits } & mask;
            if found != 0 {
                let page = word * u64::BITS + found.trailing_zeros();
                return (page < self.pages).then_some(page);
            }
            word += 1;
            mask = u64::MAX;
        }
        None
    }

    fn mark(&mut self, first: u32, pages: u32, free: bool) {
        for page in first..first + pages {
            let bit = 1 << (page % u64::BITS);
            let word = &mut self.free[(page / u64::BITS) as usize];
            debug_assert_eq!(*word & bit != 0, !free, "page {page} is taken or given twice");
            if free {
                *word |= bit;
            } else {
                *word &= !bit;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every buffer of it is a token that cannot reach it without the pool.
        let unmapped = unsafe { rustix::mm::munmap(self.memory.as_ptr().cast(), self.pages as usize * PAGE) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u32 = PAGE_U32;

    #[test]
    fn runs_do_not_overlap_and_all_pages_can_be_taken() {
        let mut pool = Pool::new(130).unwrap();
        let mut taken: Vec<Buffer> = [1, PAGE, PAGE + 1, 64 * PAGE, 3 * PAGE]
            .into_iter()
            .map(|len| pool.take(len).unwrap())
            .collect();
        while let Some(buffer) = pool.take(PAGE) {
            taken.push(buffer);
        }
        let mut pages: Vec<u32> = taken
            .iter()
            .flat_map(|buffer| buffer.first_page..buffer.first_page + buffer.pages)
            .collect();
        pages.sort_unstable();
        assert_eq!(pages, (0..130).collect::<Vec<_>>());
    }

    #[test]
    fn a_run_is_found_across_words_once_it_is_free() {
        let mut pool = Pool::new(128).unwrap();
        let low = pool.take(60 * PAGE).unwrap();
        let middle = pool.take(8 * PAGE).unwrap();
        let high = pool.take(60 * PAGE).unwrap();
        assert!(pool.take(PAGE).is_none());
        pool.give(middle);
        assert!(pool.take(9 * PAGE).is_none());
        let middle = pool.take(8 * PAGE).unwrap();
        assert_eq!(middle.first_page, 60);
        pool.give(low);
        assert_eq!(pool.take(2 * PAGE).unwrap().first_page, 0);
        drop((high, middle));
    }

    #[test]
    fn more_than_the_pool_or_nothing_is_refused() {
        let mut pool = Pool::new(4).unwrap();
        assert!(pool.take(0).is_none());
        assert!(pool.take(5 * PAGE).is_none());
        assert!(pool.take(u32::MAX).is_none());
        assert!(pool.take(4 * PAGE).is_some());
    }

    #[test]
    fn bytes_written_are_read_back() {
        let mut pool = Pool::new(4).unwrap();
        let mut one = pool.take(5000).unwrap();
        let two = pool.take(4096).unwrap();
        pool.bytes_mut(&mut one).fill(7);
        assert!(pool.bytes(&one).iter().all(|&byte| byte == 7));
        assert!(pool.bytes(&two).iter().all(|&byte| byte == 0));
        assert_eq!(pool.bytes(&one).len(), 5000);
    }
}
