"""The maths of diffusion, and the one place where its conventions are stated.

- `x_t = alpha(t) x_0 + sigma(t) eps` with eps ~ N(0, I) is the network's input. Schedules are
  variance preserving, alpha^2 + sigma^2 = 1, as EDM's is with its scaling of the input in alpha
  and sigma, or flows, alpha + sigma = 1. `sigma_edm = sigma / alpha` is what EDM and
  k-diffusion call sigma: the SNR is sigma_edm^-2, and lambda = log(alpha / sigma) is DPM-Solver's
  half log-SNR.
- Time t is what the network takes: it counts the levels 0 .. T-1 of a discrete schedule from clean
  to noisy, and is continuous for others. A timestep grid gives the levels of a sampler from noisy
  to clean, the last of which is where the final step ends.
- A network predicts `epsilon`, `sample` (x_0), `v_prediction` (alpha eps - sigma x_0), `edm` (its
  negative), `flow_prediction` (eps - x_0) or `score` (-eps / sigma). `predict` turns each of them
  into `Prediction(x0, eps)`; samplers and guidance see nothing else, except where a guidance rule
  is defined in one of these spaces.
- A path has a velocity dx/dt = alpha' x_0 + sigma' eps = a x + b score. Here time goes to noise, as
  in diffusers, SD3 and Flux: on the linear path alpha = 1 - s, sigma = s the velocity by s is
  v = eps - x_0, and sampling goes against it. Where time tau = 1 - s goes to the data (Lipman et
  al., 2210.02747; MIT 6.S184; SiT) the velocity is u = x_0 - eps = -v. Time and sign change
  together: networks of that kind are called at time 1 - tau, and their output is negated.
- Guidance: g = uncond + w (cond - uncond). w = 1 is the conditional model, w = 0 the unconditional.
- Arrays are NHWC with the image first. A number that differs between images has shape (b,), one
  that they share is a scalar. Tables are float64 on the host, arrays in a loop float32.
- Every random draw belongs to one image: the key of image i, folded with the step.
"""
