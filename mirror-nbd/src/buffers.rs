//! Memory for payloads: aligned for direct I/O, recycled, and owned by whoever may touch it.
//!
//! A payload is written once and then only read, and the types say so: a [`Fresh`] buffer has one
//! owner, who may fill it (or hand it to an operation that does); [`Fresh::freeze`] turns it into
//! a [`Buffer`], which may be shared and is never written again. Operations own their buffers
//! while the kernel uses them, so memory goes back to the pool only when the last of the core,
//! the disk and the sockets is done with it.

use mirror_core::node::boundary::Payload;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::rc::Rc;

/// What direct I/O may ask of an address, on any device in use.
pub const ALIGNMENT: usize = 4096;

/// Classes are powers of two from 4 KiB to 32 MiB; what is larger is not recycled.
const SMALLEST_SHIFT: u32 = 12;
const CLASSES: usize = 14;

/// Recycled memory kept for reuse, in bytes; the rest goes back to the system.
const KEEP: usize = 128 << 20;

/// The payload memory of one mirror.
#[derive(Clone)]
pub struct Pool(Rc<Shared>);

struct Shared {
    blocks: RefCell<Vec<Block>>,
    /// Numbers of blocks without memory.
    vacant: RefCell<Vec<u32>>,
    /// Numbers of unused blocks with memory, by class.
    spare: RefCell<[Vec<u32>; CLASSES]>,
    in_use: Cell<usize>,
    kept: Cell<usize>,
}

struct Block {
    memory: NonNull<u8>,
    capacity: usize,
    users: u32,
}

impl Pool {
    /// A pool without memory.
    pub fn new() -> Pool {
        Pool(Rc::new(Shared {
            blocks: RefCell::default(),
            vacant: RefCell::default(),
            spare: RefCell::default(),
            in_use: Cell::new(0),
            kept: Cell::new(0),
        }))
    }

    /// Bytes handed out and not given back, rounded up to their classes.
    pub fn in_use(&self) -> usize {
        self.0.in_use.get()
    }

    /// A buffer for `len` bytes. Its content is whatever an earlier payload left.
    pub fn fresh(&self, len: usize) -> Fresh {
        let shared = &self.0;
        let class = class_of(len);
        let recycled = class.and_then(|class| shared.spare.borrow_mut()[class].pop());
        let mut blocks = shared.blocks.borrow_mut();
        let index = match recycled {
            Some(index) => {
                let capacity = blocks[index as usize].capacity;
                shared.kept.set(shared.kept.get() - capacity);
                index
            }
            None => {
                let capacity = match class {
                    Some(class) => 1 << (SMALLEST_SHIFT as usize + class),
                    None => len.next_multiple_of(ALIGNMENT),
                };
                let block = Block {
                    memory: allocate(capacity),
                    capacity,
                    users: 0,
                };
                match shared.vacant.borrow_mut().pop() {
                    Some(index) => {
                        blocks[index as usize] = block;
                        index
                    }
                    None => {
                        blocks.push(block);
                        (blocks.len() - 1) as u32
                    }
                }
            }
        };
        let block = &mut blocks[index as usize];
        block.users = 1;
        shared.in_use.set(shared.in_use.get() + block.capacity);
        Fresh(Buffer {
            memory: block.memory,
            capacity: block.capacity,
            index,
            pool: Rc::clone(shared),
        })
    }
}

impl Shared {
    fn give_back(&self, index: u32) {
        let mut blocks = self.blocks.borrow_mut();
        let block = &mut blocks[index as usize];
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        self.in_use.set(self.in_use.get() - block.capacity);
        match class_of(block.capacity) {
            Some(class) if self.kept.get() + block.capacity <= KEEP => {
                self.kept.set(self.kept.get() + block.capacity);
                self.spare.borrow_mut()[class].push(index);
            }
            _ => {
                release(block.memory, block.capacity);
                block.capacity = 0;
                self.vacant.borrow_mut().push(index);
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for block in self.blocks.get_mut() {
            if block.capacity > 0 {
                release(block.memory, block.capacity);
            }
        }
    }
}

fn class_of(len: usize) -> Option<usize> {
    let shift = len.max(1).next_power_of_two().trailing_zeros();
    let class = shift.saturating_sub(SMALLEST_SHIFT) as usize;
    (class < CLASSES).then_some(class)
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity.max(ALIGNMENT), ALIGNMENT).expect("sizes are bounded")
}

fn allocate(capacity: usize) -> NonNull<u8> {
    // SAFETY: the layout is never of size zero.
    let memory = unsafe { alloc_zeroed(layout(capacity)) };
    NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(layout(capacity)))
}

fn release(memory: NonNull<u8>, capacity: usize) {
    // SAFETY: `memory` came from `allocate` with the same capacity, and the block that owned it
    // forgets it at once (its capacity becomes 0, or the whole table is dropped).
    unsafe { dealloc(memory.as_ptr(), layout(capacity)) }
}

/// A buffer with one owner, who may write it.
#[derive(Debug)]
pub struct Fresh(Buffer);

impl Fresh {
    /// The whole buffer, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: a `Fresh` is the only handle of its block, so nobody else reads or writes the
        // memory while this borrow lives; it was zeroed when allocated, so it is initialised.
        unsafe { std::slice::from_raw_parts_mut(self.0.memory.as_ptr(), self.0.capacity) }
    }

    /// The whole buffer.
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// Ends the writing: from here on the buffer may be shared.
    pub fn freeze(self) -> Buffer {
        self.0
    }
}

/// A buffer that may be shared, because nobody writes it any more.
#[derive(Debug)]
pub struct Buffer {
    memory: NonNull<u8>,
    capacity: usize,
    index: u32,
    pool: Rc<Shared>,
}

impl Buffer {
    /// The whole buffer, what lies behind the payload included.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the block lives while a handle does, it was zeroed when allocated, and while a
        // `Buffer` is visible nobody writes it: the only way to write is `Fresh::bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.capacity) }
    }

    /// Its number: what [`Payload::buffer`] says.
    pub fn number(&self) -> u32 {
        self.index
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Buffer {
        self.pool.blocks.borrow_mut()[self.index as usize].users += 1;
        Buffer {
            memory: self.memory,
            capacity: self.capacity,
            index: self.index,
            pool: Rc::clone(&self.pool),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(self.index);
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("in_use", &self.in_use.get())
            .finish_non_exhaustive()
    }
}

/// Where a payload came from: what it counts against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A guest's write, or a read of the local disk.
    Local,
    /// The peer.
    Link,
}

/// The payloads the core holds, by the number it knows them by.
#[derive(Default)]
pub struct Payloads {
    held: Vec<Option<(Buffer, Origin)>>,
    of_link: usize,
}

impl Payloads {
    /// Hands a buffer to the core: the name to give in an input.
    pub fn lend(&mut self, buffer: Buffer, len: u32, crc: u32, origin: Origin) -> Payload {
        let number = buffer.number();
        let index = number as usize;
        if self.held.len() <= index {
            self.held.resize_with(index + 1, || None);
        }
        if origin == Origin::Link {
            self.of_link += buffer.capacity;
        }
        debug_assert!(self.held[index].is_none(), "lent twice");
        self.held[index] = Some((buffer, origin));
        Payload {
            buffer: number,
            len,
            crc,
            zero: false,
        }
    }

    /// A further handle of a payload that the core named in an action.
    pub fn share(&self, payload: Payload) -> Buffer {
        let held = self.held.get(payload.buffer as usize);
        let (buffer, _) = held
            .and_then(Option::as_ref)
            .expect("the core names only payloads it holds");
        assert!(payload.len as usize <= buffer.capacity);
        buffer.clone()
    }

    /// Takes a payload back from the core.
    pub fn take_back(&mut self, payload: Payload) -> Buffer {
        let held = self.held.get_mut(payload.buffer as usize);
        let (buffer, origin) = held
            .and_then(Option::take)
            .expect("the core releases a payload once");
        if origin == Origin::Link {
            self.of_link -= buffer.capacity;
        }
        buffer
    }

    /// Bytes of memory in payloads of the peer that the core holds.
    pub fn of_link(&self) -> usize {
        self.of_link
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_recycled() {
        let pool = Pool::new();
        let first = pool.fresh(4096);
        let address = first.bytes().as_ptr() as usize;
        assert_eq!(address % ALIGNMENT, 0);
        assert_eq!(first.bytes().len(), 4096);
        drop(first);
        let second = pool.fresh(100);
        assert_eq!(second.bytes().as_ptr() as usize, address);
    }

    #[test]
    fn classes_cover_every_size_up_to_the_largest_payload() {
        assert_eq!(class_of(0), Some(0));
        assert_eq!(class_of(4096), Some(0));
        assert_eq!(class_of(4097), Some(1));
        assert_eq!(class_of(32 << 20), Some(CLASSES - 1));
        assert_eq!(class_of((32 << 20) + 1), None);
    }

    #[test]
    fn a_block_returns_only_after_its_last_user() {
        let pool = Pool::new();
        let mut fresh = pool.fresh(8192);
        fresh.bytes_mut()[0] = 7;
        let buffer = fresh.freeze();
        let other = buffer.clone();
        drop(buffer);
        assert_eq!(pool.in_use(), 8192);
        assert_eq!(other.bytes()[0], 7);
        drop(other);
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn payloads_come_back_once_and_count_by_origin() {
        let pool = Pool::new();
        let mut payloads = Payloads::default();
        let payload = payloads.lend(pool.fresh(4096).freeze(), 4096, 1, Origin::Link);
        assert_eq!(payloads.of_link(), 4096);
        let operation = payloads.share(payload);
        drop(payloads.take_back(payload));
        assert_eq!(payloads.of_link(), 0);
        assert_eq!(pool.in_use(), 4096, "an operation still uses it");
        drop(operation);
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn oversized_buffers_go_back_to_the_system() {
        let pool = Pool::new();
        let big = pool.fresh((32 << 20) + 1);
        assert!(big.bytes().len() > 32 << 20);
        drop(big);
        assert_eq!(pool.in_use(), 0);
        assert_eq!(pool.0.kept.get(), 0);
    }
}
