// Yes-or-no answers in groups, with covariates; the negative log joint density in unconstrained coordinates.
#include <TMB.hpp>

template <class Type>
Type objective_function<Type>::operator()() {
  DATA_MATRIX(x);         // (answers, 4), the first column 1
  DATA_VECTOR(z);         // (answers)
  DATA_IVECTOR(group);    // (answers), from 0
  PARAMETER_VECTOR(beta); // (4)
  PARAMETER(log_tau);
  PARAMETER_VECTOR(u);

  Type nll = -dnorm(beta, Type(0), Type(5), true).sum() - dnorm(log_tau, Type(0), Type(1), true);
  nll -= dnorm(u, Type(0), exp(log_tau), true).sum();
  vector<Type> fixed = x * beta;
  for (int i = 0; i < z.size(); i++) nll -= dbinom_robust(z(i), Type(1), fixed(i) + u(group(i)), true);
  return nll;
}
