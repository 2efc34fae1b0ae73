// Latent frames, video frames and seconds (docs/PROTOCOL.md): the first latent frame is one video frame, the others `factor`.

export class Timing {
  constructor({ fps, frames_per_block, video_frames_per_frame }) {
    this.fps = fps;
    this.blockFrames = frames_per_block;
    this.factor = video_frames_per_frame;
  }

  /** The first video frame of a latent frame. */
  videoFrame(frame) {
    return frame === 0 ? 0 : 1 + this.factor * (frame - 1);
  }

  /** The latent frame that holds a video frame. */
  frame(videoFrame) {
    return videoFrame < 1 ? 0 : 1 + Math.floor((videoFrame - 1) / this.factor);
  }

  /** When a latent frame begins, in seconds. */
  seconds(frame) {
    return this.videoFrame(frame) / this.fps;
  }

  /** Where the block that holds a latent frame begins. A picture that a branch begins with belongs to its first block. */
  blockStart(frame, branch) {
    const offset = branch.upload ? 1 : 0;
    const start = offset + Math.floor((frame - offset) / this.blockFrames) * this.blockFrames;
    return start <= offset ? 0 : start;
  }

  /** The block before (-1) or after (1) the one that begins at `start`. */
  nextBlock(start, step, branch) {
    if (step < 0) return start === 0 ? 0 : this.blockStart(start - 1, branch);
    return (start === 0 && branch.upload ? 1 : start) + this.blockFrames;
  }
}
